"""Carries out what the ControlPlane decides, and tells it what happened.

The one owner of the plane, of the links to workers and of the table of running requests; it lives
on the event loop and every call returns at once. Reports of workers go through the request's
journal, so that the gateway sees each output id once and in order, whichever worker made it.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from console import jointokens
from console.fleetrecords import FleetRecords
from console.gateway import LiveRequest, Tokens
from console.live import LiveStats
from console.localfleet import LocalFleet
from console.metrics import Metrics
from console.transport import CLOSE_POLICY, WorkerLink
from console.writer import FactWriter
from controlplane import domain, protocol
from controlplane.backfill import Allotment, OpenBatch
from controlplane.contracts import Preview
from controlplane.decisions import Explanation
from controlplane.errors import ConfigError
from controlplane.escalation import LEVEL_NAMES
from controlplane.gpuledger import GpuView
from controlplane.ledger import AccountView, RateView
from controlplane.overload import OverloadView
from controlplane.plane import ControlPlane
from controlplane.planner import SplitView

logger = logging.getLogger(__name__)

RESEND_AFTER_S = 0.5  # a gap in a request's output older than this is asked for again
STALLED_AFTER_S = 2.0  # and older than this moves the request to another worker
REQUESTS_MAX = 16_384  # running and queued; the plane's queues are smaller
REFUSALS_KEPT = 50  # workers that were not let in; the newest
LINKS_MAX = 4_096  # open worker connections
CLOSE_RESTARTING = 1012
GAVE_UP = ("error", "cancelled")  # ends of a sequence that are no end of the output


@dataclass(slots=True)
class Connection:
    """A worker's socket; `worker_id` is empty until the plane has welcomed it."""

    link: WorkerLink
    worker_id: str = ""
    epoch: int = 0
    name: str = ""  # as its Hello says


class Fleet:
    """The driver of one ControlPlane. Not thread-safe: call on the event loop only."""

    def __init__(
        self,
        plane: ControlPlane,
        metrics: Metrics,
        writer: FactWriter,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.requests: dict[str, LiveRequest] = {}
        self.backend: LocalFleet | None = None  # starts and stops workers for the plan
        self.live: LiveStats | None = None  # set once by serve: LiveStats reads this fleet's view
        self.num_ticks = 0
        self.refusals: deque[tuple[str, str]] = deque(maxlen=REFUSALS_KEPT)  # name, reason
        self._plane = plane
        self._metrics = metrics
        self._records = FleetRecords(writer.put)
        self._clock = clock
        self._uniform = uniform
        self._connections: dict[str, Connection] = {}
        self._connection_of: dict[str, str] = {}  # worker id -> connection id
        self._join_tokens = jointokens.SpentTokens()
        self._held: dict[str, Tokens] = {}  # first ids that wait for their request's KV to move
        self._gaps: set[str] = set()  # requests whose journal waits for ids
        self._resent_at_s: dict[str, float] = {}

    def now_s(self) -> float:
        """The clock of everything in the plane: monotonic seconds."""
        return self._clock()

    def view(self) -> domain.ClusterView:
        """What pages show of the plane now."""
        return self._plane.view(self.now_s())

    def explain(self, request_id: str) -> Explanation | None:
        """Every decision about a request that runs or has ended not long ago."""
        return self._plane.explain(request_id)

    def rates(self, live: LiveRequest) -> tuple[RateView, RateView] | None:
        """See ControlPlane.rates."""
        return self._plane.rates(live.request, self.now_s())

    def accounts(self) -> tuple[AccountView, ...]:
        """Contracts and where they stand, for pages and metrics."""
        return self._plane.accounts(self.now_s())

    def gpu_seconds(self) -> tuple[GpuView, ...]:
        """How each worker has spent its time."""
        return self._plane.gpu_seconds()

    def overload(self) -> OverloadView:
        """The rung of the overload ladder and its signals."""
        return self._plane.overload()

    def splits(self) -> tuple[SplitView, ...]:
        """Prefill and decode workers of each model, with what the forecast asks for."""
        return self._plane.splits(self.now_s())

    def preview(self, contracts: Sequence[domain.Contract]) -> tuple[Preview, ...]:
        """What these contracts would commit; nothing changes."""
        return self._plane.preview(contracts)

    def lines_wanted(self, batches: Sequence[OpenBatch]) -> list[Allotment]:
        """Which lines of open batches to submit now; nothing changes."""
        return self._plane.lines_wanted(batches, self.now_s())

    def assessed(self, model_id: str, slack: float) -> int:
        """The promises of a model were tested; gives how far batch goes for them now."""
        self.handle(domain.SlackAssessed(model_id, slack))
        return self._plane.batch_level(model_id)

    def mint_join_token(self, name: str) -> str:
        """A token for one Hello of a worker."""
        return jointokens.mint(name)

    # --- workers ------------------------------------------------------------------------------

    def connected(self, connection_id: str, link: WorkerLink) -> None:
        if len(self._connections) >= LINKS_MAX:
            link.send(protocol.Refused("too many workers are connected", permanent=False))
            link.close(CLOSE_POLICY, "too many workers")
            return
        self._connections[connection_id] = Connection(link)

    def received(self, connection_id: str, message: protocol.FromWorker) -> None:
        """One decoded frame of a worker."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return  # refused or fenced; its last frames are still in flight
        self._metrics.worker_frames.inc()
        if isinstance(message, protocol.Hello):
            self._hello(connection_id, connection, message)
        elif not connection.worker_id:
            connection.link.close(CLOSE_POLICY, "not welcomed")
        elif isinstance(message, protocol.StepReport):
            for report in message.sequences:
                self._deliver(connection.worker_id, report)
            self._tell_plane(connection, message.load)
        else:
            self._tell_plane(connection, message)

    def disconnected(self, connection_id: str) -> None:
        connection = self._connections.pop(connection_id, None)
        if connection is None or not connection.worker_id:
            return
        if self._connection_of.get(connection.worker_id) == connection_id:
            del self._connection_of[connection.worker_id]
        self.handle(domain.WorkerClosed(connection.worker_id, connection.epoch))

    def close_links(self) -> None:
        """The server ends: workers may look for the next one."""
        for connection in self._connections.values():
            connection.link.close(CLOSE_RESTARTING, "the console restarts")

    def _hello(self, connection_id: str, connection: Connection, hello: protocol.Hello) -> None:
        connection.name = hello.name
        refusal = "" if hello.token is None else self._join_tokens.refusal(hello.token)
        if hello.token is None and hello.resume is None:
            refusal = "a join token is missing"
        if refusal:
            logger.warning("worker refused name=%s reason=%s", hello.name, refusal)
            self.refusals.append((hello.name, refusal))
            connection.link.send(protocol.Refused(refusal))
            connection.link.close(CLOSE_POLICY, "join token")
            return
        self.handle(domain.WorkerHello(connection_id, hello))
        if hello.token is not None and connection.worker_id:
            self._join_tokens.spend(hello.token)

    def _tell_plane(self, connection: Connection, message: Any) -> None:
        if isinstance(message, protocol.HandoffFailed) and self._has_all_ids(message.request_id):
            return  # its first id was its last: the prefill worker had nothing to hand off
        load = message.load if isinstance(message, protocol.Heartbeat) else message
        if isinstance(load, protocol.WorkerLoad) and self.live is not None:
            self.live.observe_load(load, self.now_s())
        self.handle(domain.WorkerMessage(connection.worker_id, connection.epoch, message))

    def _send(self, worker_id: str, message: protocol.ToWorker) -> None:
        """To a worker that is there; a worker that just left is the plane's next event anyway."""
        connection = self._connections.get(self._connection_of.get(worker_id, ""))
        if connection is not None:
            connection.link.send(message)

    # --- requests -----------------------------------------------------------------------------

    def submit(self, live: LiveRequest) -> None:
        """Take a request in; its outcome arrives in `live.events` as domain.Decided."""
        request_id = live.request_id
        assert request_id not in self.requests, f"{request_id} submitted twice"
        assert len(self.requests) < REQUESTS_MAX, f"{REQUESTS_MAX} requests in the table"
        self.requests[request_id] = live
        self.handle(domain.Submit(live.request))

    def first_token(self, live: LiveRequest, ttft_s: float) -> None:
        self.handle(domain.FirstToken(live.request_id, ttft_s))

    def finished(self, live: LiveRequest, status: str) -> None:
        """The gateway is done with a request (completed, cancelled or failed); the plane stops what
        a worker still does for it."""
        request_id = live.request_id
        if self.requests.pop(request_id, None) is None:
            return
        self._held.pop(request_id, None)
        self._gaps.discard(request_id)
        self._resent_at_s.pop(request_id, None)
        self.handle(domain.Finished(request_id, status, live.delivered_tokens, live.itl_s_p99))

    def _deliver(self, worker_id: str, report: protocol.SequenceReport) -> None:
        live = self.requests.get(report.request_id)
        if live is None:
            return  # ended here; its cancel is on the way
        journal = live.journal
        charged = (report.prefill_gpu_s, report.decode_gpu_s)
        if sum(charged) > 0.0:
            live.gpu_s[worker_id, report.epoch] = charged
        if report.epoch >= journal.epoch:
            live.cached_tokens = max(live.cached_tokens, report.cached_tokens)
        was_finished = journal.finish_reason is not None
        fresh = journal.accept(
            report.epoch,
            report.seq,
            report.token_ids,
            self.now_s(),
            report.finish_reason,
            report.logprobs,
        )
        finish_reason = None if was_finished else journal.finish_reason
        if fresh and live.epoch > 1 and live.progressed_epoch != live.epoch:
            live.progressed_epoch = live.epoch
            self.handle(domain.Progressed(live.request_id, live.epoch))
        if fresh or finish_reason is not None:
            self._pass_on(live, worker_id, Tokens(fresh, finish_reason))
        if journal.missing_since_s is None:
            self._gaps.discard(report.request_id)
        else:
            self._gaps.add(report.request_id)
        if report.finish_reason in GAVE_UP and journal.finish_reason is None:
            logger.warning("sequence failed request=%s worker=%s", report.request_id, worker_id)
            self.handle(domain.SequenceFailed(worker_id, report.request_id, report.epoch))

    def _pass_on(self, live: LiveRequest, worker_id: str, tokens: Tokens) -> None:
        """To the gateway, in order. The first id of a prompt that is handed off waits until the
        decode worker begins its first step with the KV (HandoffDone): TTFT contains the transfer,
        as predicted, and the next id follows after one step."""
        is_first = live.journal.next_seq == len(tokens.token_ids) and tokens.finish_reason is None
        placement = live.placement
        is_moving = placement is not None and placement.split == "handoff"
        if is_first and is_moving and worker_id == placement.prefill_worker:
            self._held[live.request_id] = tokens
            return
        self._release(live)
        live.events.put(tokens)

    def _release(self, live: LiveRequest) -> None:
        """Decoding begins, the transfer has failed, or later ids are here already."""
        held = self._held.pop(live.request_id, None)
        if held is not None:
            live.events.put(held)

    def _has_all_ids(self, request_id: str) -> bool:
        live = self.requests.get(request_id)
        return live is None or live.journal.finish_reason is not None

    def _close_gaps(self, now_s: float) -> None:
        """Ask again for ids that did not come, then move the request."""
        for request_id in list(self._gaps):
            live = self.requests[request_id]
            since_s = live.journal.missing_since_s
            if since_s is None:
                self._gaps.discard(request_id)
            elif now_s - since_s > STALLED_AFTER_S:
                self._gaps.discard(request_id)
                self.handle(domain.Stalled(request_id, live.journal.epoch))
            elif (
                now_s - since_s > RESEND_AFTER_S
                and now_s - self._resent_at_s.get(request_id, since_s) > RESEND_AFTER_S
            ):
                self._resent_at_s[request_id] = now_s
                self._ask_again(live)

    def _ask_again(self, live: LiveRequest) -> None:
        if live.placement is not None:
            message = protocol.Resend(live.request_id, live.journal.epoch, live.journal.next_seq)
            self._send(live.placement.decode_worker, message)

    # --- the plane ----------------------------------------------------------------------------

    def tick(self) -> None:
        """Every 100 ms."""
        self.num_ticks += 1
        self.handle(domain.Tick())
        self._close_gaps(self.now_s())
        view = self.view()
        self._metrics.set_workers(view.workers)
        self._records.workers(view.workers)

    def handle(self, event: domain.Event) -> None:
        """Give the plane an event and carry out what it answers."""
        for command in self._plane.handle(event, self.now_s(), self._uniform):
            self.execute(command)

    def execute(self, command: domain.Command) -> None:
        match command:
            case domain.Greet(connection_id, message):
                self._greet(connection_id, message)
            case domain.CloseWorker(worker_id, reason):
                connection_id = self._connection_of.pop(worker_id, "")
                connection = self._connections.pop(connection_id, None)
                if connection is not None:
                    connection.link.close(CLOSE_POLICY, reason)
            case domain.Dispatch():
                self._dispatch(command)
            case domain.CancelSequence(worker_id, request_id, epoch):
                self._send(worker_id, protocol.Cancel(request_id, epoch))
            case domain.Reattach(worker_id, request_id, epoch):
                live = self.requests.get(request_id)
                if live is not None:
                    seq = live.journal.next_seq
                    self._send(worker_id, protocol.Resend(request_id, epoch, seq))
            case domain.SendRole(worker_id, role):
                self._send(worker_id, protocol.SetRole(role))
            case domain.SendPolicy(worker_id, policy):
                self._send(worker_id, protocol.SetPolicy(policy))
            case domain.SendDrain(worker_id):
                self._send(worker_id, protocol.Drain())
            case domain.SendUnload(worker_id, model_id):
                self._send(worker_id, protocol.UnloadModel(model_id))
            case domain.SendLoad(worker_id, model_id):
                self._send(worker_id, protocol.LoadModel(model_id))
            case domain.StartWorker() | domain.StopWorker() | domain.DrainWorker():
                self._size_fleet(command)
            case domain.Escalated(model_id, level, slack):
                words = LEVEL_NAMES[level]
                logger.info("batch level model=%s level=%s slack=%.2f", model_id, words, slack)
            case domain.Harvested():
                self._records.harvest(command)
            case domain.PlanChanged():
                self._records.plan(command)
            case _:
                self._tell_request(command)

    def _size_fleet(
        self, command: domain.StartWorker | domain.StopWorker | domain.DrainWorker
    ) -> None:
        """The plan gives these only when a backend was offered."""
        assert self.backend is not None, command
        match command:
            case domain.StartWorker(name, role, model_id):
                try:
                    self.backend.start(name, role, model_id)
                except (ConfigError, OSError) as error:
                    self.start_failed(name, str(error))
            case domain.DrainWorker(name):
                self.backend.drain(name)
            case domain.StopWorker(name):
                self.backend.stop(name)

    def offer(self, backend: LocalFleet) -> None:
        """From now on the plan says how many workers run."""
        self.backend = backend
        self.handle(backend.offer())

    def start_failed(self, name: str, reason: str) -> None:
        """A worker process will not join, or not again."""
        logger.warning("worker will not start name=%s reason=%s", name, reason)
        self.handle(domain.StartFailed(name, reason))

    def _greet(self, connection_id: str, message: protocol.Welcome | protocol.Refused) -> None:
        connection = self._connections.get(connection_id)
        if connection is None:
            return
        connection.link.send(message)
        if isinstance(message, protocol.Refused):
            logger.warning("worker refused connection=%s reason=%s", connection_id, message.reason)
            self.refusals.append((connection.name, message.reason))
            connection.link.close(CLOSE_POLICY, "refused")
            return
        former_id = self._connection_of.get(message.worker_id)
        former = self._connections.pop(former_id, None) if former_id is not None else None
        if former is not None:
            former.link.close(CLOSE_POLICY, "replaced by a newer connection")
        connection.worker_id, connection.epoch = message.worker_id, message.epoch
        self._connection_of[message.worker_id] = connection_id
        logger.info("worker joined worker=%s epoch=%d", message.worker_id, message.epoch)

    def _dispatch(self, command: domain.Dispatch) -> None:
        live = self.requests.get(command.request_id)
        if live is None:
            return
        live.journal.move(command.epoch)
        targets = live.targets
        if command.tier == "surplus":  # late from the start: behind all that may be in time
            targets = msgspec.structs.replace(targets, ttft_s_left=0.0)
        self._send(
            command.worker_id,
            protocol.Assign(
                request_id=command.request_id,
                epoch=command.epoch,
                model_id=live.request.model_id,
                stage=command.stage,
                prompt_ids=live.prompt_ids,
                delivered=list(live.journal.ids),
                sampling=live.sampling,
                targets=targets,
                salt=live.salt,
                handoff_out=command.handoff_out,
                handoff_in=command.handoff_in,
            ),
        )

    def _tell_request(self, command: domain.Command) -> None:
        """What a request's own record keeps."""
        live = self.requests.get(command.request_id)
        if live is None:
            return
        match command:
            case domain.Decided():
                self._decided(live, command)
            case domain.HandoffCounted(bytes=num_bytes, seconds=seconds, recomputed_tokens=tokens):
                self._release(live)
                live.handoff_bytes += num_bytes
                live.handoff_ms += seconds * 1000
                live.handoff_recomputed_tokens += tokens
                if num_bytes:
                    self._metrics.handoff_seconds.observe(seconds)
            case domain.MoveCounted(from_worker=worker_id, to_worker=other_id, is_copied=is_copied):
                how = "copied" if is_copied else "recomputed"
                self._metrics.planned_moves.labels(how).inc()
                logger.info(
                    "moved request=%s from=%s to=%s kv=%s",
                    command.request_id, worker_id, other_id, how,
                )  # fmt: skip
            case domain.FailoverCounted(from_worker=worker_id, epoch=epoch):
                live.failovers += 1
                logger.info(
                    "failover request=%s from=%s epoch=%d", command.request_id, worker_id, epoch
                )

    def _decided(self, live: LiveRequest, decided: domain.Decided) -> None:
        live.waited_s = decided.record.waited_s
        if isinstance(decided.outcome, domain.Placed):
            live.placement, live.epoch = decided.outcome.placement, decided.outcome.epoch
        self._release(live)
        live.events.put(decided)
