"""The worker's command line: every wrong value stops the start and is named."""

from pathlib import Path

import pytest

from controlplane.errors import ConfigError
from gpuworkers import config
from gpuworkers.config import TOKEN_VARIABLE, WORKERS_MAX, parse

JOIN = ["--join", "ws://127.0.0.1:8000/ws/worker"]
FAKE = [*JOIN, "--engine", "fake"]
ENVIRON = {TOKEN_VARIABLE: "secret"}


def test_token_comes_from_the_environment_or_the_command_line() -> None:
    assert parse(FAKE, ENVIRON).tokens == ("secret",)
    assert parse([*FAKE, "--token", "given"], ENVIRON).tokens == ("given",)


def test_many_workers_share_one_token_or_have_one_each() -> None:
    shared = parse([*FAKE, "--count", "3", "--name", "pool"], ENVIRON)
    assert [shared.token(index) for index in range(3)] == ["secret"] * 3
    assert [shared.worker_name(index) for index in range(3)] == ["pool-1", "pool-2", "pool-3"]
    each = parse([*FAKE, "--count", "2"], {TOKEN_VARIABLE: "a,b"})
    assert [each.token(index) for index in range(2)] == ["a", "b"]


def test_model_id_defaults_to_the_folder_or_to_the_modelled_one(tmp_path: Path) -> None:
    assert parse(FAKE, ENVIRON).model_id == config.MODELLED_MODEL_ID
    native = parse([*JOIN, "--model", str(tmp_path)], ENVIRON)
    assert native.model_id == tmp_path.name and native.engine == "native"
    assert parse([*JOIN, "--model", str(tmp_path), "--model-id", "m"], ENVIRON).model_id == "m"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--join", "http://127.0.0.1:8000"], "--join"),
        (["--join", "ws://"], "--join"),
        (["--count", "0"], "--count"),
        (["--count", str(WORKERS_MAX + 1)], "--count"),
        (["--threads", "0"], "--threads"),
        (["--kv-tokens", "-1"], "--kv-tokens"),
        (["--nice", "20"], "--nice"),
        (["--name", "a b"], "--name"),
        (["--name", "x" * 65], "--name"),
        (["--handoff-bind", "0.0.0.0"], "--handoff-bind"),
        (["--handoff-bind", "::"], "--handoff-bind"),
        (["--handoff-bind", "everywhere"], "--handoff-bind"),
        (["--engine", "native"], "--model"),
        (["--engine", "native", "--model", "/does/not/exist"], "--model"),
        (["--engine", "native", "--count", "2"], "--count"),
        (["--engine", "native", "--device", "cuda"], "--device"),
        (["--engine", "native", "--device", "cuda:100"], "--device"),
        (["--engine", "native", "--device", "cuda:0", "--numerics", "exact"], "--numerics"),
        (["--engine", "native", "--device", "cuda:0", "--dtype", "fp32"], "--dtype"),
        (["--count", "3", "--token", "a,b"], "2 join tokens"),
    ],
)
def test_wrong_value_is_named(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse([*FAKE, *arguments], ENVIRON)


def test_missing_token_is_named() -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        parse(FAKE, {})


@pytest.mark.parametrize("arguments", [["--unheard-of"], ["--role", "encode"], ["--count", "x"]])
def test_unknown_option_ends_the_process(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([*FAKE, *arguments], ENVIRON)
    assert ended.value.code == 2


def test_largest_count_is_allowed() -> None:
    assert parse([*FAKE, "--count", str(WORKERS_MAX)], ENVIRON).count == WORKERS_MAX


def test_numerics_are_exact_on_a_cpu_and_fast_on_a_gpu(tmp_path: Path) -> None:
    native = [*JOIN, "--model", str(tmp_path)]
    assert parse(native, ENVIRON).numerics == "exact"
    assert parse([*native, "--numerics", "fast"], ENVIRON).numerics == "fast"
    assert parse([*native, "--device", "cuda:1"], ENVIRON).numerics == "fast"
