"""Rows of the console, and the rules of one row."""

from console.models.alerts import Alert, AlertRule, ensure_default_rules
from console.models.audit import AuditEvent
from console.models.contracts import ContractRow
from console.models.costs import CostMinute, GpuMinute
from console.models.files import Batch, BatchLine, File
from console.models.fleet import (
    CapacityBin,
    Model,
    PlanOrder,
    SLOClassRow,
    Worker,
    ensure_default_classes,
)
from console.models.idempotency import IdempotencyRecord
from console.models.requests import PlanRecord, RequestRecord
from console.models.tenants import ApiKey, ApiToken, Quota, Tenant

__all__ = [
    "Alert",
    "AlertRule",
    "ApiKey",
    "ApiToken",
    "AuditEvent",
    "Batch",
    "BatchLine",
    "CapacityBin",
    "ContractRow",
    "CostMinute",
    "File",
    "GpuMinute",
    "IdempotencyRecord",
    "Model",
    "PlanOrder",
    "PlanRecord",
    "Quota",
    "RequestRecord",
    "SLOClassRow",
    "Tenant",
    "Worker",
    "ensure_default_classes",
    "ensure_default_rules",
]
