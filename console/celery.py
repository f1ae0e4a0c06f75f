"""Celery for side work only: embedded in `serve` without Redis, worker and beat with it.

A task is a doorbell: it names a row, and the row says what is to be done, by whom and whether it is
done. Losing one costs until the next sweep, running one twice changes nothing.
"""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "console.settings")

app = Celery("console")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["console"])
