"""Planted bugs: does the simulation find them? `make sim-mutants`.

Mutations are drawn by a seed over lines that the simulation executes, at least PER_FILE in each
file, and applied one at a time to a scratch copy of the packages. A mutant is caught when a seed
breaks a law or ends in an error; equivalent ones are in EQUIVALENT, with the reason, and not drawn.
"""

import argparse
import ast
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from controlplane.sim import scenario, swarm

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "controlplane/plane.py",
    "controlplane/registry.py",
    "controlplane/failover.py",
    "controlplane/moving.py",
    "controlplane/ledger.py",
    "controlplane/certificate.py",
    "controlplane/journal.py",
    "gpuworkers/scheduler.py",
    "gpuworkers/blocks.py",
)
PER_FILE = 3
NUM_MUTANTS = 30
SEEDS_MAX = 120  # tried on one mutant
PROCESSES = 2
COVER_SEEDS = 4
# Processor seconds of one mutant, three times what SEEDS_MAX take: one that never ends is caught
# too. Not wall time: on a busy machine a survivor would look like one that never ends.
CPU_S = 200
SWAPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
# Source lines whose mutants change nothing that anybody could see, and why.
EQUIVALENT = {
    "worker_id for worker_id, until_s in self.avoid_until_s.items() if until_s > now_s": "differs"
    " at one instant, a frame's time plus seconds, at which no event falls",
    "worker.is_out = worker.is_ejected(now_s)": "the next tick says the same; is_ejected already"
    " keeps work away, and is_out only says where the worker is filed",
}
# Functions likewise.
EQUIVALENT_IN = {
    "_chunk_root": "a start value: chunk_tokens brings any chunk to the same length afterwards",
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the number of its node in a walk over the file's syntax."""

    file: str
    line: int
    index: int
    what: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.what}"


def covered_lines() -> dict[str, set[int]]:
    """Lines of FILES that a few seeds execute."""
    wanted = {str(ROOT / name): name for name in FILES}
    seen: dict[str, set[int]] = {name: set() for name in FILES}

    def trace(frame, event, argument):  # noqa: ARG001
        name = wanted.get(frame.f_code.co_filename)
        if name is None:
            return None

        def lines(frame, event, argument):
            if event == "line":
                seen[name].add(frame.f_lineno)
            return lines

        return lines

    sys.settrace(trace)
    try:
        for seed in range(COVER_SEEDS):
            swarm.run(scenario.draw(seed))
    finally:
        sys.settrace(None)
    return seen


def candidates(file: str, lines: set[int]) -> Iterator[Mutant]:
    source = (ROOT / file).read_text()
    tree, text = ast.parse(source), source.splitlines()
    left_out = {
        id(node)
        for top in ast.walk(tree)
        if isinstance(top, ast.Assert)
        or (isinstance(top, ast.FunctionDef) and top.name in EQUIVALENT_IN)
        for node in ast.walk(top)
    }
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        if line not in lines or id(node) in left_out or text[line - 1].strip() in EQUIVALENT:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield Mutant(file, line, index, f"swaps {type(node.ops[0]).__name__}")
        elif isinstance(node, ast.If):
            yield Mutant(file, line, index, "negates a condition")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield Mutant(file, line, index, "drops a call")
        elif isinstance(node, ast.AugAssign):
            yield Mutant(file, line, index, "drops an update")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield Mutant(file, line, index, "drops an assignment")


def mutated(mutant: Mutant, source: str) -> str:
    tree = ast.parse(source)
    node = list(ast.walk(tree))[mutant.index]
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        for parent in ast.walk(tree):
            for field in ("body", "orelse"):
                block = getattr(parent, field, None)
                if isinstance(block, list) and node in block:
                    block[block.index(node)] = ast.Pass()
    return ast.unparse(ast.fix_missing_locations(tree))


def draw(seed: int) -> list[Mutant]:
    chance, lines = random.Random(seed), covered_lines()
    chosen: list[Mutant] = []
    rest: list[Mutant] = []
    for file in FILES:
        found = list(candidates(file, lines[file]))
        chance.shuffle(found)
        chosen += found[:PER_FILE]
        rest += found[PER_FILE:]
    chance.shuffle(rest)
    return chosen + rest[: NUM_MUTANTS - len(chosen)]


def catch(mutant: Mutant) -> str:
    """How it was caught, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for package in ("controlplane", "gpuworkers"):
            shutil.copytree(ROOT / package, scratch / package)
        path = scratch / mutant.file
        path.write_text(mutated(mutant, path.read_text()))
        command = [sys.executable, "-m", "controlplane.sim", "swarm", "--until-failure"]
        command += ["--seeds", str(SEEDS_MAX)]
        limited = ["sh", "-c", f'ulimit -t {CPU_S}; exec "$@"', "sh", *command]
        done = subprocess.run(limited, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "it never ends"
    return (done.stdout.splitlines() or done.stderr.splitlines() or ["no start"])[0][:120]


def main() -> int:
    parser = argparse.ArgumentParser(description="planted bugs against the simulation")
    parser.add_argument("--seed", type=int, default=20261124)
    options = parser.parse_args()
    mutants = draw(options.seed)
    caught = 0
    with ThreadPool(PROCESSES) as pool:
        for mutant, how in zip(mutants, pool.imap(catch, mutants), strict=True):
            caught += bool(how)
            print(f"{'caught  ' if how else 'SURVIVED'} {mutant.name}  {how}", flush=True)
    print(f"mutants: caught={caught}/{len(mutants)}", flush=True)
    return 0 if caught >= len(mutants) - 2 else 1


if __name__ == "__main__":
    sys.exit(main())
