"""Workers as a REST resource: the live view of the control plane, and orders to it."""

from typing import Any

from django.http import Http404
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from console import plans, state
from console.api.errors import Unavailable
from console.api.serializers import PlannerSerializer, RoleSerializer, WorkerSerializer
from controlplane import domain


async def _handle(fleet: Any, event: domain.Event) -> None:
    fleet.handle(event)


async def _workers(fleet: Any) -> tuple[domain.WorkerView, ...]:
    return fleet.view().workers


@extend_schema(parameters=[OpenApiParameter("worker_id", str, OpenApiParameter.PATH)])
class WorkerViewSet(viewsets.ViewSet):
    """Members of the cluster. Only the process that runs the control plane can answer."""

    lookup_field = "worker_id"
    serializer_class = WorkerSerializer

    @extend_schema(parameters=[], responses=WorkerSerializer(many=True))
    def list(self, request: Request, **kwargs: Any) -> Response:
        return Response({"results": [_shown(worker) for worker in self._views()]})

    @extend_schema(responses=WorkerSerializer)
    def retrieve(self, request: Request, worker_id: str, **kwargs: Any) -> Response:
        return Response(_shown(self._view(worker_id)))

    @extend_schema(request=RoleSerializer, responses={202: WorkerSerializer})
    @action(detail=True, methods=["post"])
    def role(self, request: Request, worker_id: str, **kwargs: Any) -> Response:
        """Change what a worker is asked to do; sequences in hand go on."""
        worker = self._view(worker_id)
        wanted = RoleSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        by = request.user.get_username()
        self._order(domain.RoleOrdered(worker.worker_id, wanted.validated_data["role"], by))
        return Response(_shown(self._view(worker_id)), status=202)

    @extend_schema(request=None, responses={202: WorkerSerializer})
    @action(detail=True, methods=["post"])
    def drain(self, request: Request, worker_id: str, **kwargs: Any) -> Response:
        """Give a worker nothing new; it finishes what it has."""
        worker = self._view(worker_id)
        self._order(domain.DrainOrdered(worker.worker_id, request.user.get_username()))
        return Response(_shown(self._view(worker_id)), status=202)

    @extend_schema(parameters=[], request=None, responses={202: WorkerSerializer(many=True)})
    @action(detail=False, methods=["post"])
    def rollback(self, request: Request, **kwargs: Any) -> Response:
        """Undo the planner's newest change of a role; the planner then leaves that worker alone."""
        self._order(domain.PlanRolledBack(request.user.get_username()))
        return Response([_shown(worker) for worker in self._views()], status=202)

    @extend_schema(parameters=[], request=PlannerSerializer, responses={202: PlannerSerializer})
    @action(detail=False, methods=["post"])
    def planner(self, request: Request, **kwargs: Any) -> Response:
        """Let the planner act (`auto`) or only record what it would do (`shadow`)."""
        wanted = PlannerSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        mode = wanted.validated_data["mode"]
        by = request.user.get_username()
        self._order(domain.PlannerOrdered(mode, by))
        plans.note_mode(mode, by)
        return Response({"mode": mode}, status=202)

    def _views(self) -> tuple[domain.WorkerView, ...]:
        return self._call(_workers)

    def _view(self, worker_id: str) -> domain.WorkerView:
        for worker in self._views():
            if worker.worker_id == worker_id:
                return worker
        raise Http404(f"no worker {worker_id}")

    def _order(self, event: domain.Event) -> None:
        self._call(_handle, event)

    def _call(self, function: Any, *args: Any) -> Any:
        current = state.get()
        if current is None:
            raise Unavailable
        try:
            return current.call(function, current.fleet, *args)
        except TimeoutError:
            raise Unavailable("The control plane did not answer in time.") from None


def _shown(worker: domain.WorkerView) -> dict[str, Any]:
    load = worker.load
    total = 0 if load is None else load.kv_blocks_total
    used = None if load is None or total == 0 else 1 - load.kv_blocks_free / total
    return {
        "worker_id": worker.worker_id,
        "name": worker.name,
        "engine": worker.engine,
        "role": worker.role,
        "status": worker.status,
        "device": worker.device.name,
        "models": [model.model_id for model in worker.models],
        "requests": worker.requests,
        "kv_used_ratio": used,
        "heard_ago_ms": worker.heard_ago_s * 1000,
        "exception": worker.exception,
    }
