"""Waiting requests of one class, fair over tenants, and over a tenant's keys, by GPU time.

Source: virtual token counter, Sheng et al. 2024 (arXiv:2401.00588): serve the backlogged tenant
with the smallest counter; one that comes back starts no lower than the smallest of those that
waited. Counters are in marginal GPU-seconds over weight (algorithms.md 2g). Within a quantum of the
smallest one the longest cached prefix goes first: Cao et al. 2025 (DLPM, arXiv:2501.14312).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from math import ceil

from controlplane.domain import GenerateRequest
from controlplane.gpuseconds import request_s
from controlplane.protocol import StepModel

KEYS_MAX = 256  # counters of one tenant's keys
COSTS_KEPT = 64  # newest costs of a tenant, for the quantum
QUANTUM_COSTS = 2.0  # of a tenant's p95 request: how far locality may go before fairness
OUTPUT_PRIOR = 0.5  # of the output asked for, until a tenant's outputs are known
OUTPUT_WEIGHT = 0.1  # of one output in a tenant's mean
REBASE_S = 10_000.0  # counters that have grown by so much lose it: differences are all that counts
WEIGHT_MIN = 1e-3  # a tenant of weight 0 is served in the surplus tier, after all others there

Lane = tuple[str, str]  # key and model: a model without a worker holds up nobody else
Hits = Callable[[GenerateRequest], int]  # prompt tokens that some worker has cached


class Counters:
    """Virtual counters by name, at most `kept_max` of names that wait for nothing."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._served_s: OrderedDict[str, float] = OrderedDict()  # idle longest first
        self._floor_s = 0.0

    def __getitem__(self, name: str) -> float:
        return self._served_s.get(name, self._floor_s)

    def __len__(self) -> int:
        return len(self._served_s)

    def activate(self, name: str) -> None:
        """It waits again: idle time has earned it nothing."""
        self._served_s[name] = max(self[name], self._floor_s)
        self._served_s.move_to_end(name)

    def charge(self, name: str, seconds: float, waiting: Iterable[str]) -> None:
        """`seconds` of work, by weight; `waiting` are the names that wait, this one included."""
        self._floor_s = max(self._floor_s, min(self[other] for other in waiting))
        self.correct(name, seconds)
        if self._floor_s > REBASE_S:
            floor_s, self._floor_s = self._floor_s, 0.0
            for other, served_s in self._served_s.items():
                self._served_s[other] = max(0.0, served_s - floor_s)

    def correct(self, name: str, seconds: float) -> None:
        """More or less than was charged; a name that was forgotten stays so."""
        if name in self._served_s:
            self._served_s[name] += seconds

    def trim(self, waiting: Iterable[str]) -> None:
        """Forget those idle longest."""
        if len(self._served_s) <= self._kept_max:
            return
        kept = set(waiting)
        for name in [name for name in self._served_s if name not in kept]:
            if len(self._served_s) <= self._kept_max:
                return
            del self._served_s[name]


@dataclass(slots=True)
class _Tenant:
    """One tenant's waiting requests by lane, first come first served inside one."""

    weight: float
    lanes: dict[Lane, OrderedDict[str, GenerateRequest]] = field(default_factory=dict)
    keys: Counters = field(default_factory=lambda: Counters(KEYS_MAX))
    output_tokens: float | None = None  # mean of what its requests had
    costs_s: deque[float] = field(default_factory=lambda: deque(maxlen=COSTS_KEPT))

    def waiting_keys(self) -> set[str]:
        return {key for key, _ in self.lanes}

    def in_turn(self, limit: int) -> Iterator[GenerateRequest]:
        """Its requests, keys taking turns from the least served one on."""
        lanes = sorted(self.lanes.items(), key=lambda item: (self.keys[item[0][0]], item[0]))
        for row in zip_longest(*(islice(waiting.values(), limit) for _, waiting in lanes)):
            yield from (request for request in row if request is not None)

    def output_mean(self, request: GenerateRequest) -> float:
        prior = OUTPUT_PRIOR * request.output_tokens_max
        mean = prior if self.output_tokens is None else self.output_tokens
        return min(mean, request.output_tokens_max)

    def quantum_s(self) -> float:
        """How far its counter may be above the smallest while locality decides."""
        ordered = sorted(self.costs_s)
        return QUANTUM_COSTS * ordered[ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class _Running:
    """What a started request was charged, until its end says what it cost."""

    tenant_id: str
    key_id: str
    weight: float
    model: StepModel
    uncached_tokens: int
    prompt_tokens: int
    charged_s: float

    def cost_s(self, output_tokens: float) -> float:
        return request_s(self.model, self.uncached_tokens, self.prompt_tokens, output_tokens)


class FairQueue:
    """Bounded by its owner."""

    def __init__(self, tenants_max: int) -> None:
        self._tenants_max = tenants_max
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # that wait, or have a counter
        self._lane_of: dict[str, tuple[str, Lane]] = {}  # of waiting requests
        self._counters = Counters(tenants_max)
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, int] = {}  # requests by tenant

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._lane_of

    @property
    def is_batch(self) -> bool:
        """Of its requests, if it has any: they are all of one class."""
        return any(request.slo.is_batch for request in self.requests())

    def push(self, request: GenerateRequest) -> None:
        assert request.request_id not in self._lane_of, request.request_id
        tenant_id, weight = request.tenant_id, max(request.weight, WEIGHT_MIN)
        tenant = self._tenants.setdefault(tenant_id, _Tenant(weight))
        tenant.weight = weight
        if tenant_id not in self._waiting:
            self._counters.activate(tenant_id)
        if request.key_id not in tenant.waiting_keys():
            tenant.keys.activate(request.key_id)
            tenant.keys.trim({*tenant.waiting_keys(), request.key_id})
        lane = (request.key_id, request.model_id)
        tenant.lanes.setdefault(lane, OrderedDict())[request.request_id] = request
        self._lane_of[request.request_id] = (tenant_id, lane)
        self._waiting[tenant_id] = self._waiting.get(tenant_id, 0) + 1
        self._trim()

    def _trim(self) -> None:
        self._counters.trim(self._waiting)
        if len(self._tenants) <= self._tenants_max:
            return
        for tenant_id in [name for name in self._tenants if name not in self._waiting]:
            if len(self._tenants) <= self._tenants_max:
                return
            del self._tenants[tenant_id]

    def heads(self, limit: int, hits: Hits | None = None) -> list[GenerateRequest]:
        """Requests to try next: the first of each tenant, least served tenant first, then the
        seconds and so on, so that one which finds no room holds up none behind it."""
        order = sorted(self._waiting, key=self._counters.__getitem__)[:limit]  # else by arrival
        if hits is not None and len(order) > 1:
            least = order[0]
            order.sort(key=lambda name: self._locality(name, least, hits))
        turns = (self._tenants[name].in_turn(limit) for name in order)
        heads: list[GenerateRequest] = []
        for row in zip_longest(*turns):
            heads += [request for request in row if request is not None]
            if len(heads) >= limit:
                break
        return heads[:limit]

    def _locality(self, name: str, least: str, hits: Hits) -> tuple[bool, int, float]:
        """Those within their quantum of the least served, the longest cached prefix first; then
        the others."""
        tenant, served_s = self._tenants[name], self._counters[name]
        is_far = served_s > self._counters[least] + tenant.quantum_s() / tenant.weight
        cached = 0 if is_far else hits(next(tenant.in_turn(1)))
        return (is_far, -cached, served_s)

    def take(self, request_id: str, model: StepModel, uncached_tokens: int) -> GenerateRequest:
        """The request starts on a worker of that model: its tenant and key are charged for it, with
        the output that the tenant's requests usually have."""
        tenant_id, _ = self._lane_of[request_id]
        tenant = self._tenants[tenant_id]
        waiting, keys = list(self._waiting), tenant.waiting_keys()
        request = self.remove(request_id)
        running = _Running(
            tenant_id,
            request.key_id,
            tenant.weight,
            model,
            uncached_tokens,
            request.prompt_tokens,
            request_s(model, uncached_tokens, request.prompt_tokens, tenant.output_mean(request)),
        )
        self._running[request_id] = running
        self._counters.charge(tenant_id, running.charged_s / running.weight, waiting)
        tenant.keys.charge(request.key_id, running.charged_s, keys)
        return request

    def settle(self, request_id: str, output_tokens: int | None) -> None:
        """It has ended with so many output tokens: the charge becomes what it cost. None: it was
        given up, and costs nothing. One that never started was not charged."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        cost_s = 0.0 if output_tokens is None else running.cost_s(output_tokens)
        more_s = cost_s - running.charged_s
        self._counters.correct(running.tenant_id, more_s / running.weight)
        tenant = self._tenants.get(running.tenant_id)
        if tenant is None:
            return
        tenant.keys.correct(running.key_id, more_s)
        if output_tokens is not None:
            tenant.costs_s.append(cost_s)
            mean = output_tokens if tenant.output_tokens is None else tenant.output_tokens
            tenant.output_tokens = mean + OUTPUT_WEIGHT * (output_tokens - mean)

    def remove(self, request_id: str) -> GenerateRequest:
        """The request leaves unserved."""
        tenant_id, lane = self._lane_of.pop(request_id)
        lanes = self._tenants[tenant_id].lanes
        request = lanes[lane].pop(request_id)
        if not lanes[lane]:
            del lanes[lane]
        self._waiting[tenant_id] -= 1
        if not self._waiting[tenant_id]:
            del self._waiting[tenant_id]
            self._tenants.move_to_end(tenant_id)
        return request

    def newest_of_longest(self, tenant_id: str) -> GenerateRequest | None:
        """The newest request of the tenant with most of them here, when that has more than the
        given one would have with one more."""
        longest = max(self._waiting, key=lambda name: (self._waiting[name], name), default=None)
        if longest is None or self._waiting[longest] <= self._waiting.get(tenant_id, 0) + 1:
            return None
        lanes = self._tenants[longest].lanes.values()
        newest = [next(reversed(waiting.values())) for waiting in lanes]
        return max(newest, key=lambda request: (request.arrived_at_s, request.request_id))

    def served_s(self, tenant_id: str) -> float:
        """The tenant's counter: GPU-seconds over weight."""
        return self._counters[tenant_id]

    def requests(self) -> list[GenerateRequest]:
        return [
            request
            for tenant_id in self._waiting
            for waiting in self._tenants[tenant_id].lanes.values()
            for request in waiting.values()
        ]

    def position(self, request_id: str) -> int:
        """Place in line when tenants, and the lanes of one, take turns; 1 is next."""
        tenant_id, own = self._lane_of[request_id]
        lanes = self._tenants[tenant_id].lanes
        rank = list(lanes[own]).index(request_id) + 1
        rank = sum(
            rank if lane == own else min(len(waiting), rank - 1) for lane, waiting in lanes.items()
        )
        return sum(
            rank if name == tenant_id else min(count, rank - 1)
            for name, count in self._waiting.items()
        )

    def check_integrity(self) -> None:
        """Sums equal the requests they stand for."""
        counts = {name: sum(map(len, self._tenants[name].lanes.values())) for name in self._tenants}
        assert {name: count for name, count in counts.items() if count} == self._waiting, counts
        assert len(self._lane_of) == sum(self._waiting.values()), self._waiting
