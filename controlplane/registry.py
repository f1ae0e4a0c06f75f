"""Workers: who is a member, when it was last heard, what it was given and what it reported.

A worker's epoch is raised at each (re)connection; messages of an older epoch count for nothing.
"""

import hashlib
import hmac
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import msgspec

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.contracts import Capacity
from controlplane.latency import (
    HINGE_ROWS,
    StepFeatures,
    decode_step_s,
    is_sound,
    prompt_context_token_s,
    prompt_token_s,
    step_s,
)

PROBE = StepFeatures().with_decodes(8, 8_192).with_tokens(0, 256)  # a step to compare models by
STEP_RATIOS_KEPT = 20  # of the newest reported steps


@dataclass(slots=True)
class Reservation:
    """What one dispatched request takes of a worker until it leaves.

    Prefill tokens and blocks count on top of the worker's own report only until a report came
    after its `Accepted`, so that concurrent decisions do not use the same room twice."""

    request_id: str
    stage: protocol.Stage
    is_batch: bool
    prefill_tokens: int
    blocks: int
    context_tokens: int
    is_accepted: bool = False
    is_reported: bool = False
    is_surplus: bool = False
    is_prefilling: bool = True  # until its first output id
    is_struck: bool = False  # a worker died with it: alone of its kind here until it goes on


class Pace(msgspec.Struct, frozen=True):
    """What predictions take of a worker, computed once per change of its state. Seconds, tokens."""

    model: protocol.StepModel
    token_s: float  # of one more prompt token in a large step
    chunk_context_s: float
    rows: int  # of the online sequences placed on it that decode
    is_decoding: bool  # online rows, ours or those it reports
    beside_s: float  # the step of those rows
    fixed_s: float  # what a step with a chunk takes beyond the chunk
    row_s: float  # one more decode row, without its context
    blocks_free: int  # for an online sequence
    blocks_free_batch: int
    ahead_tokens: int  # prompt tokens before a new one of the guaranteed tier
    ahead_tokens_all: int  # and of the surplus tier


@dataclass(slots=True)
class Swap:
    """A worker on its way from one model to another; see plans.py."""

    model_id: str
    before: str  # empty: it serves none
    stage: Literal["emptying", "unloading", "loading"]
    since_s: float
    retry_at_s: float = 0.0
    is_return: bool = False  # to the model it had, since the other did not load


@dataclass(slots=True)
class Worker:
    """The plane's only mutable record of a worker."""

    worker_id: str
    epoch: int
    nonce: int  # part of its resume secret
    hello: protocol.Hello
    role: protocol.Role
    connection_id: str
    heard_at_s: float
    role_since_s: float
    joined_at_s: float
    status: domain.WorkerStatus = "live"
    busy_s: float = 0.0  # age of the step in hand when last heard
    load: protocol.WorkerLoad | None = None
    held_until_s: float = 0.0  # the planner leaves it alone until then
    is_drain_ordered: bool = False
    reservations: dict[str, Reservation] = field(default_factory=dict)
    unreported: dict[str, Reservation] = field(default_factory=dict)
    prefill_tokens_given: int = 0  # of online requests, while its last report cannot include them
    blocks_given: int = 0  # likewise, of all requests
    blocks_given_online: int = 0
    num_online: int = 0
    num_online_decoding: int = 0  # of them, those that decode here, or will
    num_batch: int = 0
    batch_blocks: int = 0  # that its batch sequences may come to hold
    online_context_tokens: int = 0  # prompts of the online sequences that decode here
    num_struck: int = 0
    num_unproven: int = 0  # without an id from here yet
    ejected_until_s: float = 0.0
    eject_reason: str = ""
    is_out: bool = False  # suspect or ejected at the last tick
    # Steps lately, each over what it would have taken when the worker joined.
    step_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=STEP_RATIOS_KEPT))
    is_on_trial: bool = False  # after an ejection: one online request at a time shows how it is
    # Uncached prompt tokens of online requests without an output id, as they were given, by tier.
    guaranteed_tokens: int = 0
    surplus_tokens: int = 0
    max_model_len: dict[str, int] = field(default_factory=dict)  # tokens, by model it serves
    first_model: protocol.StepModel | None = None  # with which it joined; reconnects bring others
    swap: Swap | None = None  # while its status is loading
    _pace: Pace | None = None

    @property
    def pace(self) -> Pace:
        if self._pace is None:
            self._pace = self._make_pace()
        return self._pace

    def _make_pace(self) -> Pace:
        load, model, rows = self.load, self.step_model, self.num_online_decoding
        beside_s = decode_step_s(model, rows, self.online_context_tokens)
        row_s = model.per_token_s + model.per_sequence_s
        if rows >= HINGE_ROWS[0]:
            row_s += model.per_token_over_s[0]
        if rows >= HINGE_ROWS[1]:
            row_s += model.per_token_over_s[1]
        ahead = self.prefill_tokens_ahead
        return Pace(
            model,
            prompt_token_s(model),
            prompt_context_token_s(model),
            rows,
            rows > 0 or (load is not None and load.running_online > 0),
            beside_s,
            max(model.base_s, beside_s),
            row_s,
            self.blocks_free(False),
            self.blocks_free(True),
            self._guaranteed_ahead(ahead),
            ahead,
        )

    def reserve(self, reservation: Reservation) -> None:
        """Debit at dispatch."""
        self._pace = None
        assert reservation.request_id not in self.reservations, reservation
        self.reservations[reservation.request_id] = reservation
        if not reservation.is_reported:
            self.unreported[reservation.request_id] = reservation
            self._count_unreported(reservation, 1)
        self._count(reservation, 1)

    def release(self, request_id: str) -> bool:
        """Credit when the request leaves; False when it held nothing here."""
        self._pace = None
        reservation = self.reservations.pop(request_id, None)
        if reservation is None:
            return False
        if self.unreported.pop(request_id, None) is not None:
            self._count_unreported(reservation, -1)
        self._count(reservation, -1)
        return True

    def _count_unreported(self, reservation: Reservation, sign: int) -> None:
        self.blocks_given += sign * reservation.blocks
        if not reservation.is_batch:
            self.blocks_given_online += sign * reservation.blocks
            self.prefill_tokens_given += sign * reservation.prefill_tokens

    def _count(self, reservation: Reservation, sign: int) -> None:
        self.num_struck += sign * reservation.is_struck
        self.num_unproven += sign * reservation.is_prefilling
        if reservation.is_batch:
            self.num_batch += sign
            self.batch_blocks += sign * reservation.blocks
        else:
            self.num_online += sign
            if reservation.is_prefilling:
                self._count_prompt(reservation, sign)
            if reservation.stage != "prefill":
                self.num_online_decoding += sign
                self.online_context_tokens += sign * reservation.context_tokens

    def _count_prompt(self, reservation: Reservation, sign: int) -> None:
        if reservation.is_surplus:
            self.surplus_tokens += sign * reservation.prefill_tokens
        else:
            self.guaranteed_tokens += sign * reservation.prefill_tokens

    def accepted(self, request_id: str) -> None:
        """The worker has queued it: its next report includes it."""
        if reservation := self.reservations.get(request_id):
            reservation.is_accepted = True

    def first_token(self, request_id: str) -> None:
        """Its prompt is computed."""
        self._pace = None
        reservation = self.reservations.get(request_id)
        if reservation is not None and reservation.is_prefilling:
            if not reservation.is_batch:
                self._count_prompt(reservation, -1)
            reservation.is_prefilling = False
            self.num_unproven -= 1
        if reservation is not None and reservation.is_struck:
            self.num_struck -= 1
            reservation.is_struck = False

    def report(self, load: protocol.WorkerLoad) -> None:
        """Take the worker's own numbers; what it had accepted before is part of them.

        Numbers that cannot be are left aside: predictions go on with the last that could."""
        if not (
            is_sound(load.step_model)
            and isfinite(load.predicted_s + load.measured_s + load.online_s)
            and min(load.predicted_s, load.measured_s, load.online_s) >= 0.0
            and min(load.prefill_tokens_waiting, load.kv_blocks_free, load.kv_blocks_cached) >= 0
        ):
            return
        is_new_step = self.load is None or load.step_index != self.load.step_index
        self.load, self._pace = load, None
        if is_new_step and load.predicted_s > 0.0:
            self.step_ratios.append(self._slowdown(load) * load.measured_s / load.predicted_s)
        for request_id in [key for key, held in self.unreported.items() if held.is_accepted]:
            reservation = self.unreported.pop(request_id)
            reservation.is_reported = True
            self._count_unreported(reservation, -1)

    def _slowdown(self, load: protocol.WorkerLoad) -> float:
        """A step as its model says now, over the same step when it joined."""
        assert self.first_model is not None, self.worker_id
        return step_s(load.step_model, PROBE) / step_s(self.first_model, PROBE)

    @property
    def step_ratio(self) -> float:
        """Median of the newest steps over what they would have taken when it joined."""
        ratios = sorted(self.step_ratios)
        return ratios[(len(ratios) - 1) // 2] if ratios else 1.0

    def eject(self, until_s: float, why: str) -> None:
        """No work before until_s; then it is on trial."""
        self.ejected_until_s, self.eject_reason = until_s, why
        self.is_on_trial, self._pace = False, None
        self.step_ratios.clear()

    def set_trial(self, is_on_trial: bool) -> None:
        """On trial it is predicted as fast as it was when it joined: else it would get no work that
        could show it."""
        self.is_on_trial, self.ejected_until_s, self._pace = is_on_trial, 0.0, None
        if is_on_trial:
            self.step_ratios.clear()
        else:
            self.eject_reason = ""

    def joined_with(self, hello: protocol.Hello) -> None:
        """What it is from now on; nothing reported yet."""
        self.hello, self.load, self._pace = hello, None, None
        self.first_model = self.first_model or hello.step_model
        self.max_model_len = {model.model_id: model.max_model_len for model in hello.models}

    def serves(self, changed: protocol.ModelsChanged) -> None:
        """Other models than in its Hello; nothing of them reported yet."""
        self.first_model = None
        self.step_ratios.clear()
        self.joined_with(
            msgspec.structs.replace(
                self.hello,
                models=changed.models,
                block_tokens=changed.block_tokens,
                num_blocks=changed.num_blocks,
                step_model=changed.step_model,
                host_blocks=changed.host_blocks,
                sequences=[],
            )
        )

    @property
    def kv_tokens(self) -> int:
        """Room of its KV cache."""
        return self.hello.num_blocks * self.hello.block_tokens

    @property
    def model_id(self) -> str:
        """The model it serves, the first of several; empty while it serves none."""
        return self.hello.models[0].model_id if self.hello.models else ""

    def can_load(self, model_id: str) -> bool:
        """Could it be asked to serve this model instead of the one it has?"""
        is_known = model_id in self.hello.loadable and not self.has_model(model_id)
        return is_known and self.status == "live" and len(self.hello.models) <= 1

    def left(self) -> None:
        """Its reports say nothing any more."""
        self.load, self._pace = None, None

    def has_model(self, model_id: str) -> bool:
        return model_id in self.max_model_len

    def model(self, model_id: str) -> protocol.ModelFacts:
        return next(model for model in self.hello.models if model.model_id == model_id)

    @property
    def step_model(self) -> protocol.StepModel:
        if self.is_on_trial and self.first_model is not None:
            return self.first_model
        return self.load.step_model if self.load else self.hello.step_model

    @property
    def prefill_tokens_ahead(self) -> int:
        """Online prompt tokens before a new one, those included that it has not reported yet."""
        waiting = self.load.prefill_tokens_waiting if self.load else 0
        return self.prefill_tokens_given + waiting

    def _guaranteed_ahead(self, ahead: int) -> int:
        """Those of the tokens ahead that are computed before surplus ones, which may be halfway: as
        many as were given, and all that nobody gave."""
        unknown = max(0, ahead - self.guaranteed_tokens - self.surplus_tokens)
        return min(ahead, self.guaranteed_tokens + unknown)

    def blocks_free(self, is_batch: bool) -> int:
        """KV blocks that a new sequence may get; batch rows give way to online ones."""
        free = self.hello.num_blocks
        if self.load:
            free = self.load.kv_blocks_free + self.load.kv_blocks_cached
            free += 0 if is_batch else self.load.kv_blocks_held_batch
        return free - (self.blocks_given if is_batch else self.blocks_given_online)

    @property
    def blocks_online(self) -> int:
        """KV blocks that online sequences were given: batch rows would make way."""
        return min(
            self.hello.num_blocks,
            sum(held.blocks for held in self.reservations.values() if not held.is_batch),
        )

    def _predicted_s(self) -> float:
        return max(self.load.predicted_s, self.load.measured_s) if self.load else 0.0

    def is_suspect(self, now_s: float, config: ControlPlaneConfig) -> bool:
        """Silent, or in one step, for longer than it should be: it gets no new work."""
        silent_s = now_s - self.heard_at_s
        if silent_s <= config.suspect_s_min and self.busy_s <= config.stuck_s_min:
            return False
        predicted_s = 2.0 * self._predicted_s()
        is_silent = silent_s > max(config.suspect_s_min, predicted_s)
        return is_silent or self.busy_s > max(config.stuck_s_min, predicted_s)

    def dead_reason(self, now_s: float, config: ControlPlaneConfig) -> str:
        """Why it counts as dead, else an empty string."""
        predicted_s = self._predicted_s()
        silent_s = now_s - self.heard_at_s
        if silent_s > max(config.dead_s_min, 4.0 * predicted_s):
            return f"silent for {silent_s:.1f} s"
        if self.busy_s > max(config.hung_s_min, 4.0 * predicted_s):
            return f"one step has run for {self.busy_s:.1f} s"
        return ""

    def is_ejected(self, now_s: float) -> bool:
        return now_s < self.ejected_until_s

    @property
    def trial_reason(self) -> str:
        """Why it can take no online request beside the one that tries it, else empty."""
        if not self.is_on_trial or not self.num_online:
            return ""
        return f"tried with one request after it was ejected: {self.eject_reason}"

    def is_accepting(self, now_s: float, config: ControlPlaneConfig) -> bool:
        return self.status == "live" and not self.is_suspect(now_s, config)

    def check_integrity(self) -> None:
        """Sums equal the reservations they stand for."""
        held = list(self.reservations.values())
        online = [item for item in held if not item.is_batch]
        assert self.num_online == len(online), (self.worker_id, self.num_online, len(online))
        assert self.num_batch == len(held) - len(online), (self.worker_id, self.num_batch)
        batch_blocks = sum(item.blocks for item in held if item.is_batch)
        assert self.batch_blocks == batch_blocks, (self.worker_id, self.batch_blocks)
        decoding = [item for item in online if item.stage != "prefill"]
        assert self.num_online_decoding == len(decoding), (self.worker_id, len(decoding))
        context = sum(item.context_tokens for item in decoding)
        assert self.online_context_tokens == context, (self.worker_id, context)
        for is_surplus, counted in ((False, self.guaranteed_tokens), (True, self.surplus_tokens)):
            prompts = [x for x in online if x.is_prefilling and x.is_surplus == is_surplus]
            tokens = sum(item.prefill_tokens for item in prompts)
            assert counted == tokens, (self.worker_id, is_surplus, counted, tokens)
        assert self.num_unproven == sum(item.is_prefilling for item in held), self.worker_id
        assert self.num_struck == sum(item.is_struck for item in held), self.worker_id
        assert self._pace is None or self._pace == self._make_pace(), self.worker_id
        if (pace := self._pace) is not None and pace.rows:
            more_s = decode_step_s(pace.model, pace.rows + 1, self.online_context_tokens)
            assert abs(more_s - pace.beside_s - pace.row_s) < 1e-9, (self.worker_id, pace)
        unreported = {item.request_id for item in held if not item.is_reported}
        assert set(self.unreported) == unreported, (self.worker_id, unreported)
        given = list(self.unreported.values())
        given_online = [item for item in given if not item.is_batch]
        tokens = sum(item.prefill_tokens for item in given_online)
        assert self.prefill_tokens_given == tokens, (self.worker_id, tokens)
        assert self.blocks_given == sum(item.blocks for item in given), self.worker_id
        blocks = sum(item.blocks for item in given_online)
        assert self.blocks_given_online == blocks, (self.worker_id, blocks)


class Registry:
    """All workers by id, in joining order."""

    def __init__(self, config: ControlPlaneConfig, secret: bytes) -> None:
        self._config = config
        self._secret = secret
        self._num_joined = 0
        self.policy = protocol.Policy(batch_rows_max=config.batch_rows_max)
        self.workers: dict[str, Worker] = {}

    def welcome(self, worker: Worker) -> protocol.Welcome:
        return protocol.Welcome(
            worker.worker_id,
            worker.epoch,
            self._resume_secret(worker.worker_id, worker.nonce),
            protocol.CREDIT_FRAMES,
            self.policy,
        )

    def capability(self, request_id: str, epoch: int, prefill: str, decode: str) -> str:
        """What the decode worker shows to the prefill worker, good for one transfer."""
        return self._sign(f"handoff|{request_id}|{epoch}|{prefill}|{decode}")

    def _resume_secret(self, worker_id: str, nonce: int) -> str:
        return self._sign(f"resume|{worker_id}|{nonce}")

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def join(
        self, event: domain.WorkerHello, now_s: float, uniform: Callable[[], float]
    ) -> Worker | protocol.Refused:
        """A new member, a member that is back (same id, epoch + 1), or why not."""
        hello = event.hello
        if refused := self._refused(hello):
            return refused
        role = hello.role if hello.handoff_address else "mixed"
        if hello.resume is not None:
            worker = self.workers[hello.resume.worker_id]
            worker.epoch += 1
            worker.joined_with(hello)
            worker.connection_id = event.connection_id
            worker.heard_at_s, worker.busy_s = now_s, 0.0
            worker.status = "draining" if worker.is_drain_ordered else "live"
            if hello.handoff_address is None:
                worker.role = "mixed"
            return worker
        self._num_joined += 1
        worker = Worker(
            worker_id=f"w{self._num_joined}",
            epoch=1,
            nonce=int(uniform() * (1 << 53)),
            hello=hello,
            role=role,
            connection_id=event.connection_id,
            heard_at_s=now_s,
            role_since_s=now_s,
            joined_at_s=now_s,
        )
        worker.joined_with(hello)
        self.workers[worker.worker_id] = worker
        return worker

    def _refused(self, hello: protocol.Hello) -> protocol.Refused | None:
        if protocol.VERSION not in hello.versions:
            return protocol.Refused(
                f"worker speaks protocol {hello.versions}, this console {protocol.VERSION}"
            )
        if (hello.token is None) == (hello.resume is None):
            return protocol.Refused("send a join token or a resume proof, one of them")
        if not (hello.models or hello.loadable) or hello.block_tokens < 1 or hello.num_blocks < 1:
            return protocol.Refused(
                f"{len(hello.models)} models, {hello.num_blocks} blocks of"
                f" {hello.block_tokens} tokens: nothing to serve"
            )
        if not is_sound(hello.step_model):
            return protocol.Refused(f"step model {hello.step_model} predicts no time")
        own_id = ""
        if hello.resume is not None:
            own_id = hello.resume.worker_id
            worker = self.workers.get(own_id)
            if worker is None:
                return protocol.Refused(f"worker {own_id} is not known any more, join again")
            expected = self._resume_secret(own_id, worker.nonce)
            if not hmac.compare_digest(expected.encode(), hello.resume.secret.encode()):
                return protocol.Refused(f"wrong resume secret for worker {own_id}")
        elif len(self.workers) >= self._config.workers_max:
            return protocol.Refused(f"{len(self.workers)} workers joined already", permanent=False)
        return self._refused_weights(hello.models, own_id)

    def refused_models(self, changed: protocol.ModelsChanged, own_id: str) -> str:
        """Why the worker cannot serve these models, else an empty string."""
        if changed.block_tokens < 1 or changed.num_blocks < 1 or not is_sound(changed.step_model):
            return f"{own_id} has {changed.num_blocks} blocks and step model {changed.step_model}"
        refused = self._refused_weights(changed.models, own_id)
        return refused.reason if refused else ""

    def _refused_weights(
        self, models: Sequence[protocol.ModelFacts], own_id: str
    ) -> protocol.Refused | None:
        """Other weights under a served name would change a text that moves between workers."""
        for worker in self.workers.values():
            if worker.worker_id == own_id or worker.status == "lost":
                continue
            for model in models:
                for other in worker.hello.models:
                    if (
                        other.model_id == model.model_id
                        and other.weights_sha256 != model.weights_sha256
                    ):
                        return protocol.Refused(
                            f"{model.model_id} has weights {model.weights_sha256[:12]}, worker"
                            f" {worker.worker_id} serves {other.weights_sha256[:12]}"
                        )
        return None

    def current(self, worker_id: str, epoch: int) -> Worker | None:
        """The worker when this incarnation is still its member."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.epoch != epoch or worker.status == "lost":
            return None
        return worker

    def capacity(self, model_id: str) -> Capacity | None:
        """What the live workers of a model give to contracts; None without one."""
        serving = [
            worker
            for worker in self.workers.values()
            if worker.status == "live" and worker.has_model(model_id)
        ]
        if not serving:
            return None
        slowest = max(serving, key=lambda worker: prompt_token_s(worker.step_model))
        kv_tokens = sum(worker.kv_tokens for worker in serving)
        return Capacity(model_id, len(serving), kv_tokens, slowest.step_model)

    def dead(self, now_s: float) -> list[tuple[Worker, str]]:
        """Members that have been silent or stuck for too long, with the reason."""
        found = []
        for worker in self.workers.values():
            if worker.status != "lost" and (reason := worker.dead_reason(now_s, self._config)):
                found.append((worker, reason))
        return found

    def forget_lost(self, now_s: float) -> list[Worker]:
        """Drop the workers that did not come back; gives them."""
        gone = [
            worker
            for worker in self.workers.values()
            if worker.status == "lost" and now_s - worker.heard_at_s > self._config.lost_kept_s
        ]
        for worker in gone:
            del self.workers[worker.worker_id]
        return gone

    def forgive(self, gap_s: float, now_s: float) -> None:
        """Our own loop stood still for `gap_s`: nobody could be heard in that time."""
        for worker in self.workers.values():
            worker.heard_at_s = min(now_s, worker.heard_at_s + gap_s)
