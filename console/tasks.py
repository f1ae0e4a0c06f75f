"""Side work: batch files are checked, what is left over is found again, expired files go."""

import logging

from celery import shared_task
from django.utils import timezone

from console import batchfiles
from console.batchcheck import Invalid, LineError
from console.incarnation import is_dead, new_incarnation
from console.models import Batch, File, Model

logger = logging.getLogger(__name__)

SWEEP_S = 60.0
FILES_MAX = 100  # expired files removed by one sweep
INCARNATION = new_incarnation()  # of this process


@shared_task(ignore_result=True)
def validate_batch(batch_pk: int) -> None:
    """Read the file of a new batch: it starts, or ends as failed with its mistakes."""
    batch = Batch.objects.select_related("input_file").filter(pk=batch_pk).first()
    if batch is None or batch.status != "validating" or not is_free(batch):
        return
    mine = Batch.objects.filter(pk=batch_pk, status="validating", checked_by=batch.checked_by)
    if mine.update(checked_by=INCARNATION) != 1:
        return  # another process got there first
    now = timezone.now()
    models = Model.objects.filter(is_active=True).values_list("model_id", flat=True)
    outcome: Batch | Invalid | batchfiles.Infeasible
    try:
        if batch.input_file is None:
            outcome = Invalid((LineError("file_deleted", "the file is not there any more"),))
        else:
            outcome = batchfiles.fill(batch, now, models)
    except Exception:  # a bug of ours, told once instead of tried for ever
        logger.exception("batch could not be read batch=%s", batch.batch_id)
        outcome = Invalid((LineError("internal_error", "the server failed on this file"),))
    if not isinstance(outcome, Batch):
        batchfiles.refuse(batch, outcome, now)
    logger.info("batch read batch=%s accepted=%s", batch.batch_id, isinstance(outcome, Batch))


def is_free(batch: Batch) -> bool:
    """Nobody reads its file, or whoever did is gone."""
    return not batch.checked_by or is_dead(batch.checked_by)


@shared_task(ignore_result=True)
def sweep() -> None:
    """Ring again for what was lost, and remove what has expired."""
    for batch in Batch.objects.filter(status="validating"):
        if is_free(batch):
            validate_batch.delay(batch.pk)
    expired = File.objects.filter(expires_at__lte=timezone.now())
    for file in expired.order_by("expires_at")[:FILES_MAX]:
        if not file.is_in_use():
            file.forget()
