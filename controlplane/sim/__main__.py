"""Runs the simulator as a process of its own: one JSON object on stdout, progress on stderr.
`swarm` prints a line per finding and one at the end instead.

python -m controlplane.sim coserve [--sweep]      interactive and batch work on one worker
python -m controlplane.sim latency                honesty of the latency model
python -m controlplane.sim router                 cost of a routing decision, in real time
python -m controlplane.sim fairness               a tenant beside one that floods the cluster
python -m controlplane.sim plane [--part NAME]    figures of the whole control plane on traces
python -m controlplane.sim ledger                 does every worker account for all of its time
python -m controlplane.sim deadlines              promises of batch deadlines over 28 days
python -m controlplane.sim compare --trace PATH   policies on one recorded trace, a peer's too
python -m controlplane.sim split [--search]       the planner against every fixed split of roles
python -m controlplane.sim swarm [--seeds N]      whole clusters under faults, all laws checked
python -m controlplane.sim swarm --seed S --shrink    one of them again, and made smaller
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from pathlib import Path

from controlplane import kappas
from controlplane.sim import (
    comparison,
    coserve,
    coverage,
    deadlines,
    fairness,
    hardware,
    ledgercheck,
    planebench,
    routerbench,
    scenario,
    shrink,
    split,
    swarm,
)
from controlplane.sim.planeload import Bench
from controlplane.sim.steptable import NAMES, load

ITL_TARGETS_S = (0.03, 0.05)
SWEEP_KAPPAS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
SWEEP_SEED = 5_001  # the first; no seed of a measured run
KAPPA_UNKNOWN = 0.6  # protocol.Policy's


def say(line: str) -> None:
    print(f"[{time.process_time():7.1f} s] {line}", file=sys.stderr, flush=True)


def run_coserve(options: argparse.Namespace) -> dict[str, object]:
    """Both ITL targets; the top-level figures are the worse of the two."""
    table = load(options.table)
    scenes = [coserve.Scene(table, s, options.rate, options.seconds) for s in ITL_TARGETS_S]
    if options.sweep:
        return run_sweep(scenes, options)
    shipped = kappas.load()
    seeds = range(1, options.seeds + 1)
    targets = []
    for scene in scenes:
        kappa = options.kappa or kappas.kappa_for(shipped, scene.ttft_s, scene.itl_s)
        targets.append(coserve.compare(scene, kappa, seeds, say))
    return {
        "harvest": min(target["harvest"] for target in targets),  # type: ignore[type-var]
        "ttft_p99_inflation": max(t["ttft_p99_inflation"] for t in targets),  # type: ignore[type-var]
        "itl_miss": max(target["itl_miss"] for target in targets),  # type: ignore[type-var]
        "batch_vs_tuned_chunk": min(t["batch_vs_tuned_chunk"] for t in targets),  # type: ignore[type-var]
        "miss_ratio_at_equal_batch": max(t["miss_ratio_at_equal_batch"] for t in targets),  # type: ignore[type-var]
        "table": table.file.name,
        "source": table.file.source,
        "seeds": options.seeds,
        "virtual_s": options.seconds,
        "arrivals_per_s": options.rate,
        "targets": targets,
    }


def run_sweep(scenes: list[coserve.Scene], options: argparse.Namespace) -> dict[str, object]:
    """Measure kappas and write the table that ships."""
    seeds = range(SWEEP_SEED, SWEEP_SEED + options.seeds)
    chosen, swept = [], {}
    for scene in scenes:
        rows = coserve.sweep(scene, SWEEP_KAPPAS, seeds, say)
        swept[f"{1e3 * scene.itl_s:.0f}"] = rows
        chosen.append(kappas.KappaRow(scene.ttft_s, scene.itl_s, **kappas.choose(rows)))
    kappas.write(chosen)
    return {"sweep": swept, "written": str(kappas.PATH), "kappas": [r.kappa for r in chosen]}


def run_latency(options: argparse.Namespace) -> dict[str, object]:
    scene = coserve.Scene(load(options.table), options.itl, options.rate, options.seconds)
    kappa = options.kappa or kappas.kappa_for(kappas.load(), scene.ttft_s, scene.itl_s)
    return coverage.audit(scene, kappa, options.seed)


def run_router(options: argparse.Namespace) -> dict[str, object]:
    return routerbench.run(options.blocks, options.decisions, options.repeats, time.perf_counter)


def run_fairness(options: argparse.Namespace) -> dict[str, object]:
    device = hardware.read(options.calibration)
    return fairness.run(device, options.seed, options.workers, options.seconds)


def run_ledger(options: argparse.Namespace) -> dict[str, object]:
    return ledgercheck.run(
        options.seed, options.workers, options.seconds, calibration=options.calibration
    )


def run_deadlines(options: argparse.Namespace) -> dict[str, object]:
    return deadlines.run(range(1, options.seeds + 1), say, options.days)


def run_split(options: argparse.Namespace) -> dict[str, object]:
    setting = split.Setting(options.traces, options.calibration, split.PHASES, options.seconds)
    compare = split.search if options.search else split.run
    return compare(setting, options.processes, say)


def run_plane(options: argparse.Namespace) -> dict[str, object]:
    bench = Bench(options.traces, options.calibration, options.processes, options.seed)
    names = options.part or planebench.PARTS
    machine = f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores"
    try:
        return planebench.run(bench, names, machine, say)
    except ValueError as error:  # a file that is missing, a part that is not there
        return {"error": str(error)}


def run_compare(options: argparse.Namespace) -> dict[str, object]:
    """Input that cannot be run becomes one line and exit code 2."""
    setting = comparison.Setting(
        Path(options.trace), options.speed, options.workers, options.timing
    )
    try:
        return comparison.run(setting, options.policy.split(","), options.seeds, say)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run_swarm(options: argparse.Namespace) -> int:
    """Exit code 1 when a law was broken."""
    if options.seed is not None:
        return replay(options.seed, options.shrink)
    seeds = range(options.first, options.first + options.seeds)
    if options.until_failure:
        return first_failure(seeds)
    outcomes = []
    with multiprocessing.Pool(options.processes) as pool:
        for outcome in pool.imap_unordered(play, seeds, chunksize=10):
            outcomes.append(outcome)
            if outcome.violation:
                command = f"python -m controlplane.sim swarm --seed {outcome.seed} --shrink"
                print(f"seed {outcome.seed}: {outcome.violation[:200]}\n  {command}", flush=True)
            if len(outcomes) % 200 == 0:
                say(f"{len(outcomes)} of {options.seeds} seeds")
    events = sorted(outcome.num_events for outcome in outcomes)
    reached = Counter(name for outcome in outcomes for name in outcome.reached)
    say(f"events of a seed: median {events[len(events) // 2]}, least {events[0]}")
    say(f"seeds that reached: {dict(sorted(reached.items()))}")
    missed = sorted(swarm.RARE - set(reached)) if len(outcomes) >= swarm.RARE_SEEDS else []
    if missed:
        print(f"never reached: {', '.join(missed)}", flush=True)
    violations = sum(bool(outcome.violation) for outcome in outcomes)
    print(f"sim: seeds={len(outcomes)} events={sum(events)} violations={violations}", flush=True)
    return 1 if violations or missed else 0


def first_failure(seeds: range) -> int:
    """In one process: exit code 1 with the first seed that breaks a law."""
    for seed in seeds:
        if violation := play(seed).violation:
            print(f"seed {seed}: {violation[:200]}")
            return 1
    return 0


def play(seed: int) -> swarm.Outcome:
    return swarm.run(scenario.draw(seed))


def replay(seed: int, is_shrunk: bool) -> int:
    drawn = scenario.draw(seed)
    outcome = swarm.run(drawn, keeps_commands=True)
    digest = hashlib.sha256(repr(outcome.commands).encode()).hexdigest()
    print(f"seed {seed}: {outcome.num_events} events, commands {digest[:16]}, {outcome.ends}")
    print(f"  {outcome.violation or 'no law was broken'}")
    if outcome.violation and is_shrunk:
        smaller, num_runs = shrink.shrink(drawn, outcome.law)
        print(f"after {num_runs} runs: {len(smaller.arrivals)} arrivals, faults:")
        for fault in smaller.faults:
            print(f"  {fault}")
        for arrival in smaller.arrivals:
            print(f"  {arrival}")
    return 1 if outcome.violation else 0


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m controlplane.sim")
    commands = main.add_subparsers(dest="command", required=True)
    for name in ("coserve", "latency"):
        command = commands.add_parser(name)
        command.add_argument("--table", choices=NAMES, default=NAMES[0])
        command.add_argument("--rate", type=float, default=3.0, help="interactive requests per s")
        command.add_argument("--seconds", type=float, default=500.0, help="virtual")
        command.add_argument("--kappa", type=float, default=0.0, help="0: from the shipped table")
        if name == "coserve":
            command.add_argument("--seeds", type=int, default=8)
            command.add_argument("--sweep", action="store_true", help="write the table of kappas")
        else:
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--itl", type=float, default=0.05, help="target in seconds")
    router = commands.add_parser("router")
    router.add_argument("--blocks", type=int, default=1_000_000, help="in the prefix index")
    router.add_argument("--decisions", type=int, default=2_000, help="timed in each repeat")
    router.add_argument("--repeats", type=int, default=5)
    for name, seconds in (("fairness", 40.0), ("ledger", 90.0)):
        command = commands.add_parser(name)
        command.add_argument("--calibration", default="", help="h200_steps.json or its folder")
        command.add_argument("--workers", type=int, default=8)
        command.add_argument("--seconds", type=float, default=seconds, help="virtual")
        command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("deadlines")
    command.add_argument("--seeds", type=int, default=3, help="pairs of so many days")
    command.add_argument("--days", type=int, default=deadlines.DAYS)
    command = commands.add_parser("split", help="the planner against every fixed split")
    command.add_argument("--traces", default="", help="folder of the Parquet files")
    command.add_argument("--calibration", default="", help="its file; empty: packaged step times")
    command.add_argument("--seconds", type=float, default=1_200.0, help="virtual, of each phase")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--search", action="store_true", help="find the factors of the phases")
    command = commands.add_parser("plane", help="the figures of the whole control plane")
    command.add_argument("--part", action="append", choices=planebench.PARTS, help="only these")
    command.add_argument("--traces", default="", help="folder of the Parquet files")
    command.add_argument("--calibration", default="", help="its file; empty: packaged step times")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("compare", help="policies on one recorded trace")
    command.add_argument("--trace", required=True, metavar="PATH", help="a Parquet file")
    command.add_argument("--speed", type=float, default=1.0, help="stamps are divided by it")
    command.add_argument("--workers", type=int, default=8)
    command.add_argument("--gpu", choices=("h200",), default="h200")
    command.add_argument("--model", choices=("8b",), default="8b")
    command.add_argument("--timing", choices=comparison.TIMINGS, default="calibrated")
    command.add_argument("--policy", default=",".join(comparison.POLICIES), metavar="NAME,NAME")
    command.add_argument("--seeds", type=int, default=1)
    command = commands.add_parser("swarm")
    command.add_argument("--seeds", type=int, default=200)
    command.add_argument("--first", type=int, default=0, help="the first seed")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--seed", type=int, help="only this one")
    command.add_argument("--until-failure", action="store_true", help="stop at the first one")
    command.add_argument("--shrink", action="store_true", help="make a failing one smaller")
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "swarm":
        return run_swarm(options)
    runs = {
        "coserve": run_coserve,
        "latency": run_latency,
        "router": run_router,
        "split": run_split,
        "fairness": run_fairness,
        "plane": run_plane,
        "ledger": run_ledger,
        "deadlines": run_deadlines,
        "compare": run_compare,
    }
    run = runs[options.command]
    print(json.dumps(run(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
