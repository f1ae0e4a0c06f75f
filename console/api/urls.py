"""URLs of `/api/`: version 1, its schema and its documentation."""

from django.urls import include, path
from django.views.generic import RedirectView
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from rest_framework.routers import SimpleRouter

from console.api import views
from console.api.costs import CostViewSet
from console.api.decisions import DecisionViewSet
from console.api.workers import WorkerViewSet
from console.auth import operator_required

router = SimpleRouter()
router.register("tenants", views.TenantViewSet)
router.register("keys", views.KeyViewSet)
router.register("slo-classes", views.SLOClassViewSet)
router.register("quotas", views.QuotaViewSet)
router.register("models", views.ModelViewSet)
router.register("costs", CostViewSet, basename="cost")
router.register("decisions", DecisionViewSet, basename="decision")
router.register("workers", WorkerViewSet, basename="worker")

swagger = SpectacularSwaggerSplitView.as_view(
    url_name="api-schema", template_name="console/swagger.html"
)

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="api-docs")),
    path("v1/schema/", SpectacularAPIView.as_view(api_version="v1"), name="api-schema"),
    path("v1/docs/", operator_required(swagger), name="api-docs"),
    path("v1/", include((router.urls, "api"), namespace="v1")),
]
