"""Waiting requests of one class, fair over tenants by the work they were given.

Source: virtual token counter, Sheng et al. 2024 (arXiv:2401.00588): serve the backlogged tenant
with the smallest counter; a tenant that comes back starts no lower than the counter served last.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice, zip_longest

from controlplane.domain import GenerateRequest

Flow = tuple[str, str]  # tenant and model: a model without a worker holds up nobody else


def cost_tokens(request: GenerateRequest) -> float:
    """Work of a request for its tenant's counter: a decoded token costs about two prompt tokens
    (algorithms.md 2g, 8B at 1k context)."""
    return request.prompt_tokens + 2.0 * request.output_tokens_max


@dataclass(slots=True)
class FairQueue:
    """Bounded by its owner; holds requests by flow, first come first served inside one."""

    tenants_max: int
    _flows: dict[Flow, OrderedDict[str, GenerateRequest]] = field(default_factory=dict)
    _flow_of: dict[str, Flow] = field(default_factory=dict)
    _served: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _floor: float = 0.0

    def __len__(self) -> int:
        return len(self._flow_of)

    @property
    def is_batch(self) -> bool:
        """Of its requests, if it has any: they are all of one class."""
        return any(
            request.slo.is_batch for waiting in self._flows.values() for request in waiting.values()
        )

    def push(self, request: GenerateRequest) -> None:
        assert request.request_id not in self._flow_of, request.request_id
        flow = (request.tenant_id, request.model_id)
        if not any(tenant == request.tenant_id for tenant, _ in self._flows):
            served = max(self._served.get(request.tenant_id, 0.0), self._floor)
            self._served[request.tenant_id] = served
            self._served.move_to_end(request.tenant_id)
        self._flows.setdefault(flow, OrderedDict())[request.request_id] = request
        self._flow_of[request.request_id] = flow
        self._trim()

    def _trim(self) -> None:
        """Forget the counters of the tenants idle longest."""
        if len(self._served) <= self.tenants_max:
            return
        waiting = {tenant for tenant, _ in self._flows}
        for tenant in [tenant for tenant in self._served if tenant not in waiting]:
            if len(self._served) <= self.tenants_max:
                return
            del self._served[tenant]

    def heads(self, limit: int) -> list[GenerateRequest]:
        """Requests to try next: the first of each flow, least served tenant first, then the
        seconds and so on, so that one which finds no room holds up none behind it."""
        flows = sorted(
            self._flows.values(),
            key=lambda waiting: self._order(next(iter(waiting.values()))),
        )
        heads: list[GenerateRequest] = []
        for row in zip_longest(*(islice(waiting.values(), limit) for waiting in flows)):
            heads += [request for request in row if request is not None]
            if len(heads) >= limit:
                break
        return heads[:limit]

    def _order(self, head: GenerateRequest) -> tuple[float, float, str]:
        return (self._served[head.tenant_id], head.arrived_at_s, head.request_id)

    def take(self, request_id: str) -> GenerateRequest:
        """The request starts: its work is charged to its tenant."""
        tenant_id = self._flow_of[request_id][0]
        request = self.remove(request_id)
        self._floor = max(self._floor, self._served[tenant_id])
        self._served[tenant_id] += cost_tokens(request)
        return request

    def remove(self, request_id: str) -> GenerateRequest:
        """The request leaves unserved."""
        flow = self._flow_of.pop(request_id)
        request = self._flows[flow].pop(request_id)
        if not self._flows[flow]:
            del self._flows[flow]
        return request

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._flow_of

    def requests(self) -> list[GenerateRequest]:
        return [request for waiting in self._flows.values() for request in waiting.values()]

    def position(self, request_id: str) -> int:
        """Place in line when flows take turns; 1 is next."""
        own = self._flow_of[request_id]
        rank = list(self._flows[own]).index(request_id) + 1
        return sum(
            rank if flow == own else min(len(waiting), rank - 1)
            for flow, waiting in self._flows.items()
        )
