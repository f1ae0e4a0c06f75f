"""Command line and environment of a worker process, read once into a frozen value.

An unknown option, a wrong type or an impossible pair stops the process and names the key.
"""

import argparse
import ipaddress
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from controlplane.errors import ConfigError
from controlplane.protocol import Role

TOKEN_VARIABLE = "SLACKWATER_JOIN_TOKEN"  # preferred to --token, which `ps` shows to everyone
WORKERS_MAX = 512  # modelled workers of one process
THREADS_MAX = 256
KV_TOKENS_MAX = 1 << 26
LOADABLE_MAX = 16
DEVICE = re.compile(r"cpu|cuda:\d{1,2}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODELLED_MODEL_ID = "modelled-8b"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process. `tokens` holds one join token for each worker, or one for all."""

    join_url: str
    tokens: tuple[str, ...]
    role: Role
    engine: Literal["native", "fake"]
    device: str  # cpu | cuda:N
    model_dir: Path | None  # native only
    model_id: str
    name: str
    count: int
    profile: str  # fake only
    dtype: Literal["auto", "fp32", "bf16"]
    numerics: Literal["exact", "fast"]  # exact is for cpu
    kv_tokens: int  # 0: what the engine takes by itself
    threads: int
    nice: int
    handoff_bind: str
    parent_pid: int | None
    loadable: tuple[tuple[str, Path | None], ...] = ()  # other models: id and, if native, folder

    def worker_name(self, index: int) -> str:
        return self.name if self.count == 1 else f"{self.name}-{index + 1}"

    def token(self, index: int) -> str:
        return self.tokens[index] if len(self.tokens) > 1 else self.tokens[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpuworkers", description="A Slackwater worker: joins a console and serves."
    )
    add = parser.add_argument
    add("--join", required=True, metavar="URL", help="ws://HOST:PORT/ws/worker of the console")
    add("--token", default="", help=f"join token; better in {TOKEN_VARIABLE}")
    add("--role", choices=("prefill", "decode", "mixed"), default="mixed")
    add("--engine", choices=("native", "fake"), default="native")
    add("--device", default="cpu", help="cpu or cuda:N")
    add("--model", metavar="DIR", help="folder with model.safetensors, config.json, tokenizer.json")
    add("--model-id", help="name that requests use (default: the folder's name)")
    add("--name", help="shown in the console (default: host and role)")
    add("--loadable", default="", metavar="ID[=DIR],…", help="models it can load instead")
    add("--count", type=int, default=1, help="modelled workers in this process (fake engine)")
    add("--profile", default="h200-8b", help="step times of the fake engine")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    add("--numerics", choices=("exact", "fast"), help="default: exact on cpu, fast on cuda:N")
    add("--kv-tokens", type=int, default=0, help="KV room in tokens (default: by the engine)")
    add("--threads", type=int, default=1, help="compute threads")
    add("--nice", type=int, default=0, help="lower the priority by this much")
    add("--handoff-bind", default="127.0.0.1", help="address where peers fetch KV")
    add("--exit-with-parent", type=int, metavar="PID", help="end when this parent process is gone")
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> WorkerConfig:
    """Raises ConfigError; argparse itself ends the process for what it does not understand."""
    options = _parser().parse_args(argv)
    tokens = tuple(t for t in (options.token or environ.get(TOKEN_VARIABLE, "")).split(",") if t)
    model_dir = Path(options.model) if options.model else None
    is_fake = options.engine == "fake"
    model_id = options.model_id or (
        MODELLED_MODEL_ID if is_fake else model_dir.name if model_dir else ""
    )
    config = WorkerConfig(
        join_url=options.join,
        tokens=tokens,
        role=options.role,
        engine=options.engine,
        device=options.device,
        model_dir=model_dir,
        model_id=model_id,
        name=options.name or f"{platform.node() or 'worker'}-{options.role}",
        count=options.count,
        profile=options.profile,
        dtype=options.dtype,
        numerics=options.numerics or ("exact" if options.device == "cpu" else "fast"),
        kv_tokens=options.kv_tokens,
        threads=options.threads,
        nice=options.nice,
        handoff_bind=options.handoff_bind,
        parent_pid=options.exit_with_parent,
        loadable=tuple(
            (name, Path(folder) if folder else None)
            for name, _, folder in (
                part.partition("=") for part in options.loadable.split(",") if part
            )
        ),
    )
    _check(config)
    return config


def _check(config: WorkerConfig) -> None:
    url = urlsplit(config.join_url)
    _need(url.scheme in ("ws", "wss") and bool(url.hostname), "--join", config.join_url, "ws://…")
    if not config.tokens:
        raise ConfigError(f"no join token: set {TOKEN_VARIABLE} or give --token")
    _range("--count", config.count, 1, WORKERS_MAX)
    _range("--threads", config.threads, 1, THREADS_MAX)
    _range("--kv-tokens", config.kv_tokens, 0, KV_TOKENS_MAX)
    _range("--nice", config.nice, 0, 19)
    _need(NAME.fullmatch(config.name) is not None, "--name", config.name, NAME.pattern)
    if len(config.tokens) not in (1, config.count):
        raise ConfigError(f"{len(config.tokens)} join tokens for --count {config.count}")
    _need(len(config.loadable) <= LOADABLE_MAX, "--loadable", len(config.loadable), "16 models")
    for name, folder in config.loadable:
        is_found = folder is not None and folder.is_dir()
        is_right = is_found if config.engine == "native" else folder is None
        expected = "ID=DIR, DIR a model folder" if config.engine == "native" else "ids"
        _need(bool(name) and is_right, "--loadable", f"{name}={folder or ''}", expected)
    if config.engine == "native":
        _need(config.count == 1, "--count", config.count, "1 with --engine native")
        is_device = DEVICE.fullmatch(config.device) is not None
        _need(is_device, "--device", config.device, "cpu or cuda:N")
        if config.device != "cpu":
            _need(config.numerics == "fast", "--numerics", config.numerics, "fast on a GPU")
            _need(config.dtype in ("auto", "bf16"), "--dtype", config.dtype, "bf16 on a GPU")
        if config.model_dir is None or not config.model_dir.is_dir():
            raise ConfigError(f"--model={config.model_dir}: expected a model folder")
    try:
        is_open = ipaddress.ip_address(config.handoff_bind).is_unspecified
    except ValueError:
        is_open = True
    _need(not is_open, "--handoff-bind", config.handoff_bind, "the address of one interface")


def _range(key: str, value: int, low: int, high: int) -> None:
    _need(low <= value <= high, key, value, f"{low} to {high}")


def _need(is_right: bool, key: str, value: object, expected: str) -> None:
    if not is_right:
        raise ConfigError(f"{key}={value}: expected {expected}")
