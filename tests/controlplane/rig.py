"""A ControlPlane on a hand-set clock whose conservation laws are checked after each event."""

from typing import TypeVar

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.plane import ControlPlane
from tests.factories import make_hello, make_load, make_request

SECRET = b"s" * 32
T = TypeVar("T")


def of(kind: type[T], commands: list[domain.Command]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


class Rig:
    def __init__(self, **settings: object) -> None:
        self.now_s = 0.0
        self.plane = ControlPlane(ControlPlaneConfig.from_mapping(settings), SECRET)
        self.commands: list[domain.Command] = []  # all so far
        self.welcomes: dict[str, protocol.Welcome] = {}
        self._num_connections = 0

    def handle(self, event: domain.Event) -> list[domain.Command]:
        commands = self.plane.handle(event, self.now_s, lambda: 0.25)
        self.plane.check_integrity()
        self.commands += commands
        for dispatch in of(domain.Dispatch, commands):
            is_copy = dispatch.stage == "prefill"  # of its own KV: it is about to drain
            status = self.worker(dispatch.worker_id).status
            assert status == "live" or (is_copy and status == "draining"), dispatch
        for greet in of(domain.Greet, commands):
            if isinstance(greet.message, protocol.Welcome):
                self.welcomes[greet.message.worker_id] = greet.message
        return commands

    def hello(self, hello: protocol.Hello) -> list[domain.Command]:
        self._num_connections += 1
        return self.handle(domain.WorkerHello(f"c{self._num_connections}", hello))

    def join(self, role: protocol.Role = "mixed", **facts: object) -> str:
        """A new worker; returns its id."""
        commands = self.hello(make_hello(role, **facts))  # type: ignore[arg-type]
        message = of(domain.Greet, commands)[0].message
        assert isinstance(message, protocol.Welcome), message
        return message.worker_id

    def rejoin(self, worker_id: str, *, role: protocol.Role = "mixed", **facts: object):
        proof = protocol.ResumeProof(worker_id, self.welcomes[worker_id].resume_secret)
        return self.hello(make_hello(role, resume=proof, **facts))  # type: ignore[arg-type]

    def send(self, worker_id: str, message: object, epoch: int | None = None):
        epoch = self.welcomes[worker_id].epoch if epoch is None else epoch
        return self.handle(domain.WorkerMessage(worker_id, epoch, message))  # type: ignore[arg-type]

    def close(self, worker_id: str) -> list[domain.Command]:
        return self.handle(domain.WorkerClosed(worker_id, self.welcomes[worker_id].epoch))

    def submit(self, request_id: str = "r1", **facts: object) -> list[domain.Command]:
        facts.setdefault("arrived_at_s", self.now_s)
        request = make_request(request_id, **facts)  # type: ignore[arg-type]
        return self.handle(domain.Submit(request))

    def finish(self, request_id: str = "r1", status: str = "completed"):
        return self.handle(domain.Finished(request_id, status, 4))  # type: ignore[arg-type]

    def accept(self, dispatch: domain.Dispatch) -> None:
        self.send(dispatch.worker_id, protocol.Accepted(dispatch.request_id, dispatch.epoch))

    def tick(self, seconds: float = 0.1, *, heard: tuple[str, ...] = ()) -> list[domain.Command]:
        """Time passes in ticks of 100 ms; workers in `heard` report an idle load at each."""
        commands = []
        until_s = self.now_s + seconds
        while self.now_s < until_s - 1e-9:
            self.now_s = min(until_s, self.now_s + 0.1)
            for worker_id in heard:
                commands += self.send(worker_id, make_load())
            commands += self.handle(domain.Tick())
        return commands

    def worker(self, worker_id: str) -> domain.WorkerView:
        views = self.plane.view(self.now_s).workers
        return next(view for view in views if view.worker_id == worker_id)

    def request(self, request_id: str = "r1") -> domain.RequestView | None:
        views = self.plane.view(self.now_s).requests
        return next((view for view in views if view.request_id == request_id), None)


def placement(commands: list[domain.Command]) -> domain.Placement:
    """Of the only placed decision among the commands."""
    (decided,) = of(domain.Decided, commands)
    assert isinstance(decided.outcome, domain.Placed), decided
    return decided.outcome.placement


def rejection(commands: list[domain.Command]) -> domain.Rejected:
    (decided,) = of(domain.Decided, commands)
    assert isinstance(decided.outcome, domain.Rejected), decided
    assert decided.record.outcome == "rejected"
    return decided.outcome
