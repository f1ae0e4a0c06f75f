"""`make chaos`: workers are killed and frozen at random under load; clients must not notice.

Two parts, each with real processes: the demo's model on CPUs in exact numerics, and modelled
workers whose ids are deterministic and quick. Passes when no request failed and every text, greedy
or seeded, is that of an undisturbed run. Ends by itself within 10 minutes.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path

from tests.chaos.faults import Fault, Injector, Kind
from tests.chaos.load import Load, Seen, bodies
from tests.e2e.harness import MODELLED, Server, demo_model_folder

TOTAL_S = 595.0  # then the process ends whatever it does, and its server with it
EXIT_TOO_LONG = 3
ENDING_S = 60.0  # for the streams that still run after the last fault
EFFECT_S = 0.5  # chunks that were on their way come so much after a fault


@dataclass(frozen=True)
class Part:
    name: str
    options: tuple[str, ...]  # of `manage.py serve`
    model_id: str
    num_workers: int
    num_clients: int
    output_tokens: int
    live_min: int  # workers, before the next fault
    pause_s: tuple[float, float]
    limit_s: float
    has_logprobs: bool = False


@dataclass(frozen=True)
class Result:
    """What `make chaos` prints of one part and stores as JSON."""

    part: str
    faults: int
    faults_wanted: int
    kills: int
    stops: int
    requests: int
    failed: int
    different: int
    moves: int
    restarts: int
    gap_s_p99_kill: float | None
    gap_s_p99_stop: float | None
    gap_s_max: float
    seconds: float
    problems: list[str]

    @property
    def is_passed(self) -> bool:
        return not (self.failed or self.different) and self.faults == self.faults_wanted


def real_part(folder: Path) -> Part:
    options = ("--workers", "prefill=1,decode=2", "--model", str(folder), "--numerics", "exact")
    return Part(
        "real model",
        (*options, "--model-id", "smollm2-135m"),
        "smollm2-135m",
        num_workers=3,
        num_clients=3,
        output_tokens=48,
        live_min=3,
        pause_s=(1.0, 4.0),
        limit_s=310.0,
        has_logprobs=True,
    )


MODELLED_PART = Part(
    "modelled",
    ("--workers", "prefill=1,decode=3", "--engine", "fake", "--profile", "cpu-fast"),
    MODELLED,
    num_workers=4,
    num_clients=6,
    output_tokens=200,
    live_min=3,
    pause_s=(0.2, 1.0),
    limit_s=220.0,
)


def play(
    part: Part, num_faults: int, seed: int, var: Path, running: list[Server], ends_at_s: float
) -> Result:
    """Fewer faults than wanted when the time is over."""
    began_at_s = time.monotonic()
    server = Server(var, part.options, part.model_id)
    running.append(server)
    try:
        server.start(part.num_workers)
        load = Load(
            server, bodies(part.model_id, part.output_tokens, part.has_logprobs), part.num_clients
        )
        load.learn()
        load.start()
        chance = random.Random(seed)
        injector = Injector(server, part.num_workers, chance, part.live_min, part.pause_s)
        injector.run(num_faults, min(began_at_s + part.limit_s, ends_at_s - ENDING_S))
        num_hanging = load.stop(ENDING_S)
        moves = server.metric("slackwater_failovers_total")
        restarts = server.num_starts() - part.num_workers
    finally:
        server.stop()
        running.remove(server)
    seconds = time.monotonic() - began_at_s
    return judge(part, num_faults, injector.done, load.seen, num_hanging, moves, restarts, seconds)


def judge(
    part: Part,
    num_faults: int,
    faults: list[Fault],
    seen: list[Seen],
    num_hanging: int,
    moves: float,
    restarts: int,
    seconds: float,
) -> Result:
    problems = [f"body {item.body_index}: {item.error or item.difference}" for item in seen]
    problems = [text for text in problems if not text.endswith(": ")]
    problems += [f"{num_hanging} streams did not end"] if num_hanging else []
    gaps = [item.longest_gap(0.0, inf) for item in seen]
    return Result(
        part=part.name,
        faults=len(faults),
        faults_wanted=num_faults,
        kills=sum(fault.kind == "kill" for fault in faults),
        stops=sum(fault.kind == "stop" for fault in faults),
        requests=len(seen),
        failed=sum(bool(item.error) for item in seen) + num_hanging,
        different=sum(bool(item.difference) for item in seen),
        moves=int(moves),
        restarts=restarts,
        gap_s_p99_kill=gap_s_p99(seen, faults, "kill"),
        gap_s_p99_stop=gap_s_p99(seen, faults, "stop"),
        gap_s_max=max((end_s - begin_s for begin_s, end_s in gaps), default=0.0),
        seconds=seconds,
        problems=problems,
    )


def gap_s_p99(seen: list[Seen], faults: list[Fault], kind: Kind) -> float | None:
    """Of the streams that ran at a fault, each with the gap that it fell into. A gap into which a
    stop fell counts as its, whatever else fell into it: a stop makes the longer ones."""
    gaps_s = []
    for item in seen:
        for fault in faults:
            if not item.began_at_s <= fault.at_s <= item.ended_at_s:
                continue
            begin_s, end_s = item.longest_gap(fault.at_s, fault.at_s + EFFECT_S)
            kinds = {other.kind for other in faults if begin_s - EFFECT_S <= other.at_s <= end_s}
            if fault.kind == kind and ("stop" if "stop" in kinds else kind) == kind:
                gaps_s.append(end_s - begin_s)
    gaps_s.sort()
    return gaps_s[ceil(0.99 * len(gaps_s)) - 1] if gaps_s else None


def table(results: list[Result]) -> str:
    heads = (
        "part", "faults", "kill", "stop", "requests", "failed", "different", "moves", "restarts",
        "gap p99 kill", "gap p99 stop", "gap max", "time",
    )  # fmt: skip
    rows = [heads]
    for item in results:
        gaps = (item.gap_s_p99_kill, item.gap_s_p99_stop, item.gap_s_max)
        rows.append(
            (
                item.part, f"{item.faults}/{item.faults_wanted}", str(item.kills), str(item.stops),
                str(item.requests), str(item.failed), str(item.different), str(item.moves),
                str(item.restarts), *("-" if gap is None else f"{gap:.2f} s" for gap in gaps),
                f"{item.seconds:.0f} s",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def end_too_long(running: list[Server]) -> None:
    """Nothing may hold the caller up, and nothing may be left of it."""
    print(f"chaos: not done after {TOTAL_S:.0f} s", file=sys.stderr, flush=True)
    for server in running:
        for pid in server.worker_pids().values():
            os.kill(pid, signal.SIGKILL)  # a frozen one would hear of nothing else
        server.kill()
    os._exit(EXIT_TOO_LONG)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    add = parser.add_argument
    add("--real", type=int, default=10, help="faults with the real model (default 10)")
    add("--modelled", type=int, default=40, help="faults with modelled workers (default 40)")
    add("--seed", type=int, default=1, help="of which worker, which fault and when")
    add("--json", type=Path, help="where the results are stored too")
    options = parser.parse_args(argv)
    running: list[Server] = []
    watchdog = threading.Timer(TOTAL_S, end_too_long, (running,))
    watchdog.daemon = True
    watchdog.start()
    try:
        return run(options, running, time.monotonic() + TOTAL_S - 15.0)  # servers have to end, too
    finally:
        watchdog.cancel()  # whoever called `main` goes on


def run(options: argparse.Namespace, running: list[Server], ends_at_s: float) -> int:
    """Both parts and what came of them; the exit code."""
    results = []
    print(f"chaos: seed={options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="slackwater-chaos-") as folder:
        if options.real:
            part = real_part(demo_model_folder(TOTAL_S))
            var = Path(folder) / "real"
            results.append(play(part, options.real, options.seed, var, running, ends_at_s))
            print(table(results[-1:]), flush=True)
        if options.modelled:
            var = Path(folder) / "modelled"
            results.append(
                play(MODELLED_PART, options.modelled, options.seed, var, running, ends_at_s)
            )
    is_passed = bool(results) and all(item.is_passed for item in results)
    print(table(results))
    for item in results:
        for problem in item.problems[:10]:
            print(f"{item.part}: {problem[:400]}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"seed": options.seed, "passed": is_passed}
        facts["parts"] = [asdict(item) for item in results]
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    failed = sum(item.failed for item in results)
    different = sum(item.different for item in results)
    faults = sum(item.faults for item in results)
    requests = sum(item.requests for item in results)
    print(f"chaos: faults={faults} requests={requests} failed={failed} different={different}")
    return 0 if is_passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
