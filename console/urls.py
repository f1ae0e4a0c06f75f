"""Every Django URL; `/v1`, health and metrics are answered before Django (console/asgi.py)."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", include("console.api.urls")),
    path("", include("console.pages.urls")),
]
