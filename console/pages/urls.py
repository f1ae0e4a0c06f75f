"""Every page of the console, each naming one view."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
