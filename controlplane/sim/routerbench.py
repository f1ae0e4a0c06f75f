"""What one placement decision costs in real time: the full submit of a prompt of 64 blocks, its
hashing included, against an index of a million blocks and queues that move.

The caller gives the clock. Decisions are timed one by one; everything between them is not.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.plane import ControlPlane
from controlplane.prefixes import PrefixIndex
from controlplane.sim.events import Events

BLOCK_TOKENS = 64
PROMPT_BLOCKS = 64
HOLDERS = (1, 4)
DECISION_S = 0.005  # virtual, between two submits
DECODE_S = 1.0
STEP = protocol.StepModel(0.0045, 7e-6, 3.2e-8, (2e-5, 0.0))  # Llama-3.1-8B on H200, rounded
MODEL = protocol.ModelFacts("llama-3.1-8b", "0" * 64, 131_072, 128_256, 131_072)
SLO = domain.SLOClass("interactive", 0, 0.5, 0.03)
SALT = b"benchmark tenant"


def run(
    num_blocks: int, num_decisions: int, num_repeats: int, clock: Callable[[], float]
) -> dict[str, object]:
    """Medians over the repeats; microseconds."""
    figures: dict[int, list[dict[str, float]]] = {100: [], 1000: []}
    for repeat in range(num_repeats):
        for num_workers, rows in figures.items():
            bench = Bench(num_workers, num_blocks, seed=repeat)
            rows.append(bench.time(num_decisions, clock))
    p50 = {n: median(row["p50_us"] for row in rows) for n, rows in figures.items()}
    return {
        "decision_us_p50_100": round(p50[100], 1),
        "decision_us_p99_100": round(median(row["p99_us"] for row in figures[100]), 1),
        "decision_us_p50_1000": round(p50[1000], 1),
        "decision_us_p99_1000": round(median(row["p99_us"] for row in figures[1000]), 1),
        "scale_1000_vs_100": round(p50[1000] / p50[100], 3),
        "index_bytes_per_block": round(bytes_per_block(num_blocks), 1),
        "indexed_blocks": num_blocks,
        "decisions": num_decisions,
        "repeats": num_repeats,
        "placed_share": round(median(row["placed"] for row in figures[100]), 4),
    }


def load(worker: int, waiting: int) -> protocol.WorkerLoad:
    return protocol.WorkerLoad(
        role="mixed",
        step_index=1,
        predicted_s=0.01,
        measured_s=0.01,
        online_s=0.0,
        batch_s=0.0,
        idle_s=0.0,
        rows_online=worker % 50,
        rows_batch=0,
        running_online=worker % 50,
        running_batch=0,
        waiting_online=0,
        waiting_batch=0,
        prefill_tokens_waiting=waiting,
        context_tokens_running=0,
        kv_blocks_total=12_800,
        kv_blocks_free=12_800 - 64 * (worker % 50),
        kv_blocks_cached=0,
        kv_blocks_held_batch=0,
        step_model=STEP,
    )


class Bench:
    """A plane with so many workers, and prompts whose first blocks it has seen."""

    def __init__(self, num_workers: int, num_blocks: int, seed: int) -> None:
        self.events = Events(seed)
        self.plane = ControlPlane(
            ControlPlaneConfig(prefix_block_tokens=BLOCK_TOKENS, prefix_blocks_max=4 * num_blocks),
            b"routing benchmark",
        )
        self.num_workers = num_workers
        for index in range(num_workers):
            self._join(index)
        self.chains = fill(self.plane.prefixes, num_workers, num_blocks, self.events)
        for index in range(num_workers):
            self._report(index)

    def _join(self, index: int) -> None:
        hello = protocol.Hello(
            versions=[protocol.VERSION],
            name=f"bench{index}",
            engine="fake",
            engine_version="0",
            role="mixed",
            device=protocol.DeviceFacts("modelled", "H200", 141 << 30, 132, "bf16"),
            models=[MODEL],
            block_tokens=BLOCK_TOKENS,
            num_blocks=12_800,
            step_model=STEP,
            handoff_address=f"127.0.0.1:{index}",
            token="t",
            host_blocks=1 << 20,
        )
        self._handle(domain.WorkerHello(str(index), hello))

    def _handle(self, event: domain.Event) -> list[domain.Command]:
        return self.plane.handle(event, self.events.now_s, self.events.random.random)

    def _tell(self, event: domain.Event) -> None:
        self._handle(event)

    def _report(self, index: int) -> None:
        waiting = self.events.random.choice((0, 0, 500, 2_000, 8_000))
        message = load(index, waiting)
        self._handle(domain.WorkerMessage(f"w{index + 1}", 1, message))

    def time(self, num_decisions: int, clock: Callable[[], float]) -> dict[str, float]:
        chance, seconds, num_placed = self.events.random, [], 0
        for number in range(num_decisions):
            ids = list(chance.choice(self.chains))
            depth = chance.randint(0, PROMPT_BLOCKS)  # hit depth, uniform
            for index in range(depth * BLOCK_TOKENS, len(ids)):
                ids[index] = chance.randrange(128_000)
            request_id = f"r{number}"
            now_s = self.events.now_s
            started_s = clock()
            hashes = protocol.block_hashes(SALT, ids, BLOCK_TOKENS)
            request = domain.GenerateRequest(
                request_id, "acme", MODEL.model_id, SLO, len(ids), 256, hashes, now_s, 100_000
            )
            commands = self._handle(domain.Submit(request))
            seconds.append(clock() - started_s)
            num_placed += any(isinstance(item, domain.Dispatch) for item in commands)
            for command in commands:
                self._go_on(command)
            for _ in range(2):
                self._report(chance.randrange(self.num_workers))
            self.events.run(now_s + DECISION_S)
        ordered = sorted(seconds)
        return {
            "p50_us": 1e6 * ordered[len(ordered) // 2],
            "p99_us": 1e6 * ordered[int(0.99 * len(ordered))],
            "placed": num_placed / num_decisions,
        }

    def _go_on(self, command: domain.Command) -> None:
        """The worker accepts, the first token comes about when it was predicted, the last later."""
        match command:
            case domain.Dispatch(worker_id, request_id, epoch):
                answer = protocol.Accepted(request_id, epoch)
                self._handle(domain.WorkerMessage(worker_id, 1, answer))
            case domain.Decided(request_id, domain.Placed(placement)):
                ttft_s = placement.predicted_ttft_s * self.events.random.uniform(0.8, 1.2)
                first = domain.FirstToken(request_id, ttft_s)
                last = domain.Finished(request_id, "completed", 10)
                self.events.after(ttft_s, partial(self._tell, first))
                self.events.after(ttft_s + DECODE_S, partial(self._tell, last))


def fill(
    index: PrefixIndex, num_workers: int, num_blocks: int, events: Events
) -> list[tuple[int, ...]]:
    """Chains of PROMPT_BLOCKS blocks with 1 to 4 holders each; gives the ids of a hundred."""
    chance, kept = events.random, []
    for number in range(num_blocks // PROMPT_BLOCKS):
        if number < 100:
            ids = tuple(chance.randrange(128_000) for _ in range(PROMPT_BLOCKS * BLOCK_TOKENS))
            hashes = protocol.block_hashes(SALT, ids, BLOCK_TOKENS)
            kept.append(ids)
        else:  # names are as good as any others, and making them is not what is timed
            hashes = tuple(chance.randbytes(32) for _ in range(PROMPT_BLOCKS))
        for _ in range(chance.randint(*HOLDERS)):
            index.insert(f"w{chance.randint(1, num_workers)}", hashes)
    return kept


def bytes_per_block(num_blocks: int) -> float:
    """Of an index filled like the timed ones: its dictionaries, keys and values, each once."""
    index = PrefixIndex(4 * num_blocks, 8)
    for number in range(100):
        index.join(f"w{number + 1}", 1 << 20, 1 << 20)
    fill(index, 100, num_blocks, Events(0))
    return index.num_bytes() / max(1, len(index))
