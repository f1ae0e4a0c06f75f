"""Who may import whom and what may not stand in the code: a walk over every file's syntax."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("console", "controlplane", "gpuworkers", "kernels", "tests", "manage", "deploy")
WIRE = ("protocol", "domain", "errors", "latency", "kappas", "gpuseconds")
PURE_WORKER = ("scheduler", "sequence", "blocks")
HEAVY = {"torch", "cupy"}
DJANGO = {"django", "rest_framework", "channels", "celery", "daphne", "twisted"}
IMPURE = {"asyncio", "time", "random", "datetime", "threading", "socket", "os"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("os", "system"), ("os", "popen")}


@dataclass(frozen=True, slots=True)
class Rule:
    """`ours` are the module prefixes of ours that may be imported; `outside` None means any."""

    ours: tuple[str, ...]
    outside: frozenset[str] | None = None
    never: frozenset[str] = frozenset()
    standard_never: frozenset[str] = frozenset()


def wire() -> tuple[str, ...]:
    return tuple(f"controlplane.{name}" for name in WIRE)


def pure_worker() -> tuple[str, ...]:
    return tuple(f"gpuworkers.{name}" for name in PURE_WORKER)


def rule_for(path: PurePosixPath) -> Rule:
    """The row of the table that a file stands under."""
    package, stem = path.parts[0], path.stem
    if package == "kernels":
        return Rule(ours=("kernels",), outside=frozenset({"numpy", "cupy", "torch", "cuda"}))
    if package == "gpuworkers" and len(path.parts) == 2 and stem in PURE_WORKER:
        return Rule(
            ours=(*wire(), *pure_worker()),
            outside=frozenset(),
            standard_never=frozenset(IMPURE),
        )
    if package == "gpuworkers":
        return Rule(ours=("gpuworkers", "kernels", *wire()), never=frozenset(DJANGO))
    if package == "controlplane" and path.parts[1] == "sim":
        impure = IMPURE - {"random"} if stem == "events" else IMPURE
        impure = impure - {"time"} if stem == "__main__" else impure
        return Rule(
            ours=("controlplane", *pure_worker()),
            outside=frozenset({"msgspec", "numpy", "pyarrow"}),
            standard_never=frozenset(impure),
        )
    if package == "controlplane" and stem in WIRE:
        return Rule(wire(), frozenset({"msgspec"}), standard_never=frozenset(IMPURE))
    if package == "controlplane":
        return Rule(
            ours=("controlplane",),
            outside=frozenset({"msgspec"}),
            never=frozenset({"controlplane.sim"}),
            standard_never=frozenset(IMPURE),
        )
    if package == "console" and len(path.parts) > 2 and path.parts[1] == "models":
        return console_rule({"console.pages", "console.api", "console.v1"})
    if package == "console" and len(path.parts) > 2 and path.parts[1] == "pages":
        return console_rule({"console.api", "console.v1"})
    if package == "console" and len(path.parts) > 2 and path.parts[1] == "api":
        return console_rule({"console.pages", "console.v1"})
    if path == PurePosixPath("console/v1.py"):
        return console_rule({"console.pages", "console.api"})
    if package in ("console", "manage.py"):
        return console_rule(set())
    return Rule(ours=OURS)


def console_rule(never: set[str]) -> Rule:
    return Rule(
        ours=("console", "controlplane"),
        never=frozenset({"controlplane.sim", *HEAVY, *never}),
    )


# --- the walk ------------------------------------------------------------------------------------


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def imported_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names, so that `from controlplane import sim` is seen as controlplane.sim."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def import_problems(path: PurePosixPath, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        yield "relative import"
        return
    rule = rule_for(path)
    for module in imported_modules(node):
        top = module.split(".")[0]
        if any(is_within(module, prefix) for prefix in rule.never):
            yield f"imports {module}"
        elif top in FORBIDDEN_MODULES:
            yield f"imports {module}, which runs what it reads"
        elif top in OURS:
            if not any(is_within(module, prefix) for prefix in rule.ours):
                yield f"imports {module}"
        elif top in sys.stdlib_module_names:
            if top in rule.standard_never:
                yield f"imports {module}: time, chance and I/O are arguments here"
        elif rule.outside is not None and top not in rule.outside:
            yield f"imports {module}"


def call_problems(node: ast.Call) -> Iterator[str]:
    if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
        yield f"calls {node.func.id}"
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        named = (node.func.value.id, node.func.attr)
        if named in FORBIDDEN_ATTRIBUTES:
            yield f"calls {'.'.join(named)}"
    for keyword in node.keywords:
        if keyword.arg == "shell" and getattr(keyword.value, "value", True):
            yield "starts a shell"


def is_silent(node: ast.ExceptHandler) -> bool:
    """An `except` of everything whose body does nothing."""
    catches_all = node.type is None or getattr(node.type, "id", "") in (
        "Exception",
        "BaseException",
    )
    return catches_all and all(isinstance(line, ast.Pass) for line in node.body)


def reads_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")


def problems(path: PurePosixPath, source: str) -> list[str]:
    """What is wrong with one file, each with its line."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, problem) for problem in import_problems(path, node)]
            if id(node) not in top_level:
                found.append((node.lineno, "import inside a block"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, problem) for problem in call_problems(node)]
        elif isinstance(node, ast.ExceptHandler) and is_silent(node):
            found.append((node.lineno, "swallows every exception"))
        elif path.parts[0] in ("controlplane", "kernels") and reads_environment(node):
            found.append((node.lineno, "reads the environment"))
    is_init = path.name == "__init__.py" and path != PurePosixPath("console/models/__init__.py")
    if is_init and source.strip():
        found.append((1, "__init__.py is not empty"))
    return [f"{path}:{line}: {problem}" for line, problem in sorted(found)]


def product_files() -> list[PurePosixPath]:
    packages = ("console", "controlplane", "gpuworkers", "kernels")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return [PurePosixPath(path.relative_to(ROOT).as_posix()) for path in sorted(files)]


# --- the tree as it is ---------------------------------------------------------------------------


def test_every_file_keeps_the_import_table_and_the_forbidden_list():
    found = [line for path in product_files() for line in problems(path, (ROOT / path).read_text())]
    assert found == []


def test_tests_neither_import_inside_a_block_nor_patch_our_own_code():
    found = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        path = PurePosixPath(file.relative_to(ROOT).as_posix())
        source = file.read_text()
        found += [line for line in problems(path, source) if "import inside" in line]
        if any(f'patch("{name}.' in source for name in OURS) and path.stem != "test_architecture":
            found.append(f"{path}: patches our own code")
    assert found == []


def test_the_walk_sees_every_package():
    tops = {path.parts[0] for path in product_files()}
    assert tops == {"console", "controlplane", "gpuworkers", "kernels"}


# --- planted violations: the walk must see each --------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "import controlplane.protocol"),
        ("kernels/ops.py", "import msgspec"),
        ("kernels/ops.py", "import os\nx = os.environ['A']"),
        ("gpuworkers/scheduler.py", "import numpy"),
        ("gpuworkers/scheduler.py", "import time"),
        ("gpuworkers/blocks.py", "import asyncio"),
        ("gpuworkers/sequence.py", "from gpuworkers import engine"),
        ("gpuworkers/sequence.py", "from random import random"),
        ("gpuworkers/engine.py", "from django.conf import settings"),
        ("gpuworkers/server.py", "import console.fleet"),
        ("gpuworkers/server.py", "from controlplane import plane"),
        ("gpuworkers/link.py", "from channels.layers import get_channel_layer"),
        ("controlplane/plane.py", "import asyncio"),
        ("controlplane/plane.py", "from time import monotonic"),
        ("controlplane/plane.py", "import random"),
        ("controlplane/plane.py", "from controlplane import sim"),
        ("controlplane/plane.py", "from controlplane.sim.events import Clock"),
        ("controlplane/router.py", "import numpy as np"),
        ("controlplane/router.py", "from gpuworkers import blocks"),
        ("controlplane/protocol.py", "from controlplane import plane"),
        ("controlplane/config.py", "import os\nvalue = os.environ.get('A')"),
        ("controlplane/sim/cluster.py", "import random"),
        ("controlplane/sim/cluster.py", "from gpuworkers import engine"),
        ("controlplane/sim/events.py", "import asyncio"),
        ("console/fleet.py", "import gpuworkers.engine"),
        ("console/fleet.py", "from kernels import ops"),
        ("console/demo.py", "import torch"),
        ("console/tasks.py", "from controlplane.sim import cluster"),
        ("console/pages/overview.py", "from console.api import serializers"),
        ("console/api/files.py", "from console import v1"),
        ("console/v1.py", "from console.pages import overview"),
        ("console/models/tenants.py", "from console import v1"),
        ("console/gateway.py", "from . import journal"),
        ("console/gateway.py", "def f():\n    import json"),
        ("console/gateway.py", "if True:\n    import json"),
        ("console/gateway.py", "try:\n    import json\nexcept ImportError:\n    json = None"),
        ("console/gateway.py", "import pickle"),
        ("console/gateway.py", "eval('1')"),
        ("console/gateway.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("console/gateway.py", "try:\n    f()\nexcept Exception:\n    pass"),
        ("gpuworkers/weights.py", "import torch\ntorch.load('x')"),
        ("gpuworkers/__init__.py", "VERSION = 1"),
    ],
)
def test_a_planted_violation_is_found(path, source):
    assert problems(PurePosixPath(path), source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "import torch\nfrom kernels import checks"),
        ("gpuworkers/scheduler.py", "from controlplane.protocol import Role"),
        ("gpuworkers/scheduler.py", "from gpuworkers import blocks"),
        ("gpuworkers/engine.py", "import time\nimport torch\nfrom controlplane import latency"),
        ("controlplane/plane.py", "from controlplane import router\nimport msgspec"),
        ("controlplane/sim/events.py", "import random"),
        ("controlplane/sim/cluster.py", "from gpuworkers import scheduler\nimport numpy"),
        ("console/fleet.py", "from controlplane import plane\nimport django"),
        ("console/models/__init__.py", "from console.models.tenants import Tenant"),
        ("console/pages/overview.py", "from console import live"),
    ],
)
def test_what_the_table_allows_is_not_refused(path, source):
    assert problems(PurePosixPath(path), source) == []
