"""`make setup`: which Python it takes, what it keeps, what it finishes, and that it talks."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("slackwater_setup", ROOT / "deploy/setup.py")
setup = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(setup)


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """The real Makefile beside a setup that only says that it ran; a PATH of our own."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "deploy/setup.py").write_text("import sys; print('ran', sys.argv[0])\n")
    for tool in ("sh", "awk"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("make"), *arguments],
        cwd=checkout,
        env={"PATH": str(checkout / "bin")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_make_alone_lists_every_target(checkout):
    lines = make(checkout).stdout.splitlines()
    targets = [line.split()[1] for line in lines]
    expected = "help setup demo demo-info test test-all sim-test sim-mutants chaos conformance"
    assert " ".join(targets) == f"{expected} lint clean clean-demo"


def test_setup_passes_over_a_dead_shim_and_takes_the_next_python(checkout):
    write_script(checkout / "bin/python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    write_script(checkout / "bin/python3.12", f'echo taken; exec {sys.executable} "$@"')
    result = make(checkout, "setup")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-2:] == ["taken", "ran deploy/setup.py"]


def test_setup_passes_over_a_python_that_is_too_old_or_cannot_make_environments(checkout):
    write_script(checkout / "bin/python3.11", "exit 1")
    write_script(checkout / "bin/python3", f'exec {sys.executable} "$@"')
    assert make(checkout, "setup").stdout.splitlines()[-1] == "ran deploy/setup.py"


def test_setup_prefers_the_python_that_the_user_names(checkout):
    write_script(checkout / "mine", f'echo mine; exec {sys.executable} "$@"')
    write_script(checkout / "bin/python3.11", f'echo other; exec {sys.executable} "$@"')
    result = make(checkout, "setup", f"PYTHON={checkout / 'mine'}")
    assert result.stdout.splitlines()[-2:] == ["mine", "ran deploy/setup.py"]


def test_setup_without_a_usable_python_says_in_one_line_what_to_install(checkout):
    write_script(checkout / "bin/python3.11", "exit 127")
    result = make(checkout, "setup")
    assert result.returncode != 0
    assert result.stdout.splitlines() == [
        "No usable Python: install Python 3.11, 3.12 or 3.13 with its venv module (Debian:"
        " apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python"
    ]


# --- the environment -----------------------------------------------------------------------------


def add_package(venv: Path, name: str, files: dict[str, str], record: bool = True) -> Path:
    site = venv / "lib/python3.11/site-packages"
    info = site / f"{name}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {name}\n")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    if record:
        listed = [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in listed))
    return site


def test_packages_cut_off_in_the_middle_are_taken_out_and_whole_ones_kept(tmp_path):
    add_package(tmp_path, "whole-1.0", {"whole/__init__.py": ""})
    site = add_package(tmp_path, "torn-1.0", {"torn/__init__.py": "", "torn/data.py": ""})
    (site / "torn/data.py").unlink()
    add_package(tmp_path, "unrecorded-1.0", {"unrecorded.py": ""}, record=False)
    (site / "~eft_over").mkdir()
    assert setup.remove_unfinished(tmp_path) == ["torn-1.0", "unrecorded-1.0"]
    assert sorted(path.name for path in site.glob("*.dist-info")) == ["whole-1.0.dist-info"]
    assert not (site / "~eft_over").exists()


def test_a_file_name_with_a_comma_is_no_missing_file(tmp_path):
    site = add_package(tmp_path, "odd-1.0", {"odd/a,b.txt": ""}, record=False)
    (site / "odd-1.0.dist-info/RECORD").write_text('"odd/a,b.txt",,\n')
    assert setup.remove_unfinished(tmp_path) == []


def test_an_environment_that_does_not_run_is_made_anew(tmp_path):
    venv = tmp_path / "env"
    (venv / "bin").mkdir(parents=True)
    write_script(venv / "bin/python", "exit 1")
    (venv / "torn").write_text("")
    setup.make_environment(venv)
    assert setup.runs(venv / "bin/python")
    assert not (venv / "torn").exists()


def test_only_the_stamp_of_these_locks_counts_as_finished(tmp_path):
    assert not setup.is_finished(tmp_path)
    setup.stamp(tmp_path).write_text("of other locks\n")
    assert not setup.is_finished(tmp_path)
    setup.stamp(tmp_path).write_text(setup.wanted_stamp())
    assert setup.is_finished(tmp_path)


def test_a_torch_named_by_the_user_is_never_already_finished(tmp_path, monkeypatch):
    setup.stamp(tmp_path).write_text(setup.wanted_stamp())
    monkeypatch.setenv("TORCH", "torch==2.13.0")
    assert not setup.is_finished(tmp_path)


def test_the_second_run_of_a_finished_setup_does_nothing(tmp_path):
    setup.stamp(tmp_path).write_text(setup.wanted_stamp())
    result = subprocess.run(
        [sys.executable, ROOT / "deploy/setup.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == f"setup: {tmp_path.name} is ready\n"


# --- torch ---------------------------------------------------------------------------------------


def test_torch_may_be_a_wheel_a_folder_or_arguments(tmp_path):
    wheel = tmp_path / "torch-2.13.0-cp311-none-any.whl"
    wheel.write_text("")
    assert setup.torch_arguments(str(wheel)) == [str(wheel)]
    assert setup.torch_arguments(str(tmp_path)) == [
        "--find-links",
        str(tmp_path),
        "torch==2.13.0",
    ]
    assert setup.torch_arguments("--index-url 'http://x y/'") == [
        "--index-url",
        "http://x y/",
        "torch==2.13.0",
    ]
    assert setup.torch_arguments("--pre torch==2.13.1") == ["--pre", "torch==2.13.1"]


def test_a_torch_of_the_series_is_kept(tmp_path, capsys):
    add_package(tmp_path, "torch-2.13.4+local", {})
    setup.install_torch(tmp_path, ["pip-that-must-not-run"])
    assert capsys.readouterr().out == "      keeping torch 2.13.4+local\n"


def test_a_torch_that_brings_cuda_is_announced_with_its_size_and_the_free_disk(tmp_path, capsys):
    setup.say_cuda_size(tmp_path)
    said = capsys.readouterr().out
    assert "3.0 GB to download" in said
    assert "7.0 GB on disk" in said
    assert " are free" in said
    assert "TORCH=" in said


@pytest.mark.parametrize(
    ("requires", "expected"),
    [(["sympy>=1.13"], False), (["nvidia-cudnn-cu13==9.1; platform_system == 'Linux'"], True)],
)
def test_pip_is_asked_whether_torch_needs_cuda(tmp_path, requires, expected):
    fake = tmp_path / "pip.py"
    fake.write_text(
        "import json\n"
        "print('WARNING: a line before the report')\n"
        f"print(json.dumps({{'install': [{{'metadata': {{'requires_dist': {requires}}}}}]}}))\n"
    )
    assert setup.brings_cuda([sys.executable, str(fake)]) is (expected and sys.platform == "linux")


# --- signs of life -------------------------------------------------------------------------------


def test_a_silent_step_prints_that_it_still_works(capsys):
    sleeper = [sys.executable, "-c", "import time; time.sleep(1.0)"]
    setup.run_talking(sleeper, "packages", silence_s_max=0.2)
    assert "... packages: working for " in capsys.readouterr().out


def test_silence_is_never_as_long_as_twenty_seconds():
    assert setup.SILENCE_S_MAX <= 10.0


def test_a_failing_step_ends_with_its_last_line_and_how_to_go_on():
    failing = [sys.executable, "-c", "print('no space left'); raise SystemExit(1)"]
    with pytest.raises(setup.SetupFailed, match=r"packages: no space left \(run make setup again"):
        setup.run_talking(failing, "packages")


def test_too_little_disk_is_said_with_what_is_free(tmp_path):
    setup.check_disk(tmp_path, needed_bytes=0)
    with pytest.raises(setup.SetupFailed, match="needed; free some disk"):
        setup.check_disk(tmp_path, needed_bytes=10**18)
