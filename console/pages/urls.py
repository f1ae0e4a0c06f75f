"""URLs of the operator's pages."""

from django.urls import path

from console.pages import (
    alerts,
    audit,
    batches,
    keys,
    overview,
    playground,
    queues,
    requests,
    routing,
    split,
    usage,
    workers,
)

app_name = "pages"

urlpatterns = [
    path("", overview.overview, name="overview"),
    path("live/history", overview.live_history, name="live_history"),
    path("requests/", requests.live, name="requests"),
    path("requests/history/", requests.history, name="history"),
    path("requests/<str:request_id>/", requests.detail, name="request"),
    path("requests/<str:request_id>/cancel/", requests.cancel, name="request_cancel"),
    path("queues/", queues.queues, name="queues"),
    path("workers/", workers.workers, name="workers"),
    path("workers/add/", workers.add, name="workers_add"),
    path("workers/add/<str:name>/", workers.joining, name="worker_joining"),
    path("workers/<str:worker_id>/", workers.detail, name="worker"),
    path("workers/<str:worker_id>/role/", workers.flip, name="worker_flip"),
    path("workers/<str:worker_id>/drain/", workers.drain, name="worker_drain"),
    path("split/", split.split, name="split"),
    path("split/<str:action>/", split.order, name="split_order"),
    path("alerts/", alerts.alerts, name="alerts"),
    path("alerts/<int:alert_id>/acknowledge/", alerts.acknowledge, name="alert_acknowledge"),
    path("alerts/rules/<int:rule_id>/", alerts.rule, name="alert_rule"),
    path("routing/", routing.routing, name="routing"),
    path("playground/", playground.playground, name="playground"),
    path("playground/key/", playground.key, name="playground_key"),
    path("keys/", keys.keys, name="keys"),
    path("keys/create/", keys.add, name="key_add"),
    path("keys/<str:public_id>/rotate/", keys.rotate, name="key_rotate"),
    path("keys/<str:public_id>/revoke/", keys.revoke, name="key_revoke"),
    path("usage/", usage.usage, name="usage"),
    path("audit/", audit.audit, name="audit"),
    path("batches/", batches.batches, name="batches"),
    path("batches/<str:batch_id>/", batches.detail, name="batch"),
    path("batches/<str:batch_id>/pause/", batches.pause, name="batch_pause"),
    path("batches/<str:batch_id>/resume/", batches.resume, name="batch_resume"),
    path("batches/<str:batch_id>/cancel/", batches.cancel, name="batch_cancel"),
]
