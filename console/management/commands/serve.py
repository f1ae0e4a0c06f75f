"""`manage.py serve`: the whole console in one process, and workers of this machine beside it."""

import errno
import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import connection

from console import asgi, demo, livefeed, state
from console.batches import BatchFeeder
from console.costbook import CostBook
from console.daphneserver import event_loop
from console.fleet import Fleet
from console.gateway import Gateway
from console.hostload import HostMeter
from console.live import LiveStats
from console.localfleet import LocalFleet, read_limits
from console.metrics import Metrics
from console.models import Model
from console.models.alerts import ensure_default_rules
from console.models.fleet import ensure_default_classes
from console.serving import Serving, say
from console.sidework import SideWork
from console.snapshot import SnapshotKeeper
from console.tokens import Tokenizers
from console.workerprocs import WorkerProcs, WorkerSpec, parse_workers
from console.writer import FactWriter
from controlplane.config import ControlPlaneConfig
from controlplane.errors import ConfigError
from controlplane.plane import ControlPlane

PORT_DEFAULT = 8000
MODELLED_MODEL_ID = "modelled-8b"
MODELLED_PROFILE = "cpu-fast"
MODELLED_MODEL_LEN = 32_768
FLEET_PROFILE = "h200-8b"
FLEET_MAX = 512
SMALL_MACHINE_CORES = 8  # at or below: workers step back for the server (nice)
STATIC_PACKAGES = (
    "django",
    "djangorestframework",
    "drf-spectacular-sidecar",
    "django-htmx",
    "plotly",
)
STATIC_STAMP = ".versions"


class Command(BaseCommand):
    help = "Serve the API, the console and the control plane; start workers of this machine"
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("--bind", default="127.0.0.1", help="address to listen on")
        add("--port", type=int, default=None, help=f"default {PORT_DEFAULT}; 0 takes a free one")
        add("--workers", default="", help="started here, e.g. prefill=1,decode=1")
        add("--engine", choices=("native", "fake"), default="native")
        add("--model", default="", metavar="DIR", help="model folder of native workers")
        add("--model-id", default="", help="name in requests (default: the folder's name)")
        add("--profile", default=MODELLED_PROFILE, help="step times of the fake engine")
        add("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
        add("--numerics", choices=("exact", "fast"), default="", help="default: by the device")
        add("--device", default="cpu", help="cpu, or cuda:0,cuda:1,… for the workers in turn")
        add("--loadable", default="", metavar="DIR|ID,…", help="models workers can load instead")
        add("--workers-min", type=int, default=0, metavar="N", help="the plan keeps at least N")
        add("--workers-max", type=int, default=0, metavar="N", help="let the plan start up to N")
        add("--demo", action="store_true", help="the demo: small real model, two workers, load")
        add("--fleet", type=int, default=0, metavar="N", help="add N modelled H200 workers")
        add("--no-migrate", action="store_true", help="leave the database as it is")
        add("--no-restart-workers", action="store_true", help="a worker that ended stays away")
        add("--drain-seconds", type=float, default=20.0, help="for running requests at the end")

    def handle(self, *args: Any, **options: Any) -> None:
        sys.stdout.reconfigure(line_buffering=True)
        show = demo.prepare(options) if options["demo"] else None
        if options["port"] is None:
            options["port"] = PORT_DEFAULT
        check_port(options["bind"], options["port"])
        try:
            specs = worker_specs(options)
            limits = fleet_limits(options, specs)
        except ConfigError as error:
            raise CommandError(str(error)) from None
        prepare(options, specs)
        if show is not None:
            show.seed(options["port"])
        current = compose(options, specs)
        serving = Serving(
            current,
            options["drain_seconds"],
            lambda: start(serving, options, show, local_fleet(current, specs, options, limits)),
        )
        state.current = current
        failure = serving.run(options["bind"], options["port"])
        current.snapshot.stop()
        current.writer.stop()
        if failure:
            raise CommandError(f"cannot listen on {options['bind']}:{options['port']}: {failure}")
        if show is not None:
            show.finish(current)
        if serving.is_failed:
            sys.exit(1)


def check_port(host: str, port: int) -> None:
    """A busy port is said before anything is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CommandError(
                    f"port {port} is in use: stop what listens there, or choose another with --port"
                ) from None
            raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def worker_specs(options: dict[str, Any]) -> list[WorkerSpec]:
    """One spec for each worker process. Raises ConfigError."""
    roles = parse_workers(options["workers"])
    cores = os.cpu_count() or 1
    common: dict[str, Any] = {
        "engine": options["engine"],
        "dtype": options["dtype"],
        "numerics": options["numerics"],
        "threads": 1 if cores <= SMALL_MACHINE_CORES else max(1, cores // (2 * len(roles) or 1)),
        "nice": 5 if cores <= SMALL_MACHINE_CORES else 0,
    }
    if options["engine"] == "fake":
        common["model_id"] = options["model_id"] or MODELLED_MODEL_ID
        common["profile"] = options["profile"]
    elif roles:
        folder = Path(options["model"]).expanduser()
        if not options["model"] or not (folder / "config.json").is_file():
            raise ConfigError(
                f"--model={options['model']}: expected a folder with model.safetensors, config.json"
                " and tokenizer.json (make one with python -m gpuworkers.convert)"
            )
        common["model_dir"] = str(folder.resolve())
        common["model_id"] = options["model_id"] or folder.resolve().name
    if roles:
        common["loadable"] = loadable_models(options)
    devices = options["device"].split(",")
    specs = [
        WorkerSpec(role=role, device=devices[index % len(devices)], **common)
        for index, role in enumerate(roles)
    ]
    if not 0 <= options["fleet"] <= FLEET_MAX:
        raise ConfigError(f"--fleet={options['fleet']}: expected 0 to {FLEET_MAX}")
    if options["fleet"]:
        modelled: dict[str, Any] = {"engine": "fake", "model_id": MODELLED_MODEL_ID}
        specs.append(
            WorkerSpec(role="mixed", count=options["fleet"], profile=FLEET_PROFILE, **modelled)
        )
    return specs


def loadable_models(options: dict[str, Any]) -> tuple[str, ...]:
    """As workers take them: ids of modelled models, else id=folder, the folder's name as the id.
    Raises ConfigError."""
    names = tuple(name for name in options["loadable"].split(",") if name)
    if options["engine"] == "fake":
        return names
    folders = [Path(name).expanduser().resolve() for name in names]
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--loadable={folder}: expected folders with model.safetensors")
    return tuple(f"{folder.name}={folder}" for folder in folders)


def fleet_limits(options: dict[str, Any], specs: Sequence[WorkerSpec]) -> tuple[int, int] | None:
    """How many workers the plan may run. Raises ConfigError."""
    num_now = len(parse_workers(options["workers"]))
    limits = read_limits(options["workers_min"], options["workers_max"], num_now)
    devices = options["device"].split(",")
    if limits is not None and devices != ["cpu"] and limits[1] > len(devices):
        raise ConfigError(
            f"--workers-max={limits[1]}: a worker takes a whole GPU, and --device names"
            f" {len(devices)}"
        )
    return limits


def local_fleet(
    current: state.ServerState,
    specs: Sequence[WorkerSpec],
    options: dict[str, Any],
    limits: tuple[int, int] | None,
) -> LocalFleet | None:
    if limits is None:
        return None
    templates = {spec.model_id: spec for spec in specs if spec.count == 1}
    for spec in list(templates.values()):
        for part in spec.loadable:  # started with it, such a worker can load the first model
            name, _, folder = part.partition("=")
            others = [other for other in spec.loadable if other != part]
            first = f"{spec.model_id}={spec.model_dir}" if spec.model_dir else spec.model_id
            templates[name] = replace(
                spec, model_id=name, model_dir=folder, loadable=(first, *others)
            )
    return LocalFleet(current.workers, templates, options["device"].split(","), limits)


def prepare(options: dict[str, Any], specs: Sequence[WorkerSpec]) -> None:
    """Database, static files and the rows of the models that our workers will serve."""
    if not options["no_migrate"] and connection.vendor == "sqlite":
        call_command("migrate", interactive=False, verbosity=0)
    collect_static()
    # WhiteNoise lists its files when the application is made, which may be before they are there.
    asgi.django_application.load_middleware(is_async=True)
    ensure_default_classes()
    ensure_default_rules()
    for spec in specs:
        remember_model(spec.model_id, spec.model_dir)
        for part in spec.loadable:
            name, _, folder = part.partition("=")
            remember_model(name, folder)


def remember_model(model_id: str, folder: str) -> None:
    """The row by which requests may name it; modelled ones have no folder."""
    max_model_len = MODELLED_MODEL_LEN
    if folder:
        config = json.loads((Path(folder) / "config.json").read_text())
        max_model_len = int(config["max_position_embeddings"])
    Model.objects.update_or_create(
        model_id=model_id, defaults={"folder": folder, "max_model_len": max_model_len}
    )


def collect_static() -> None:
    """Collect once for each set of package versions and own files."""
    digest = hashlib.sha256()
    for name in STATIC_PACKAGES:
        digest.update(f"{name}={importlib.metadata.version(name)};".encode())
    own = Path(__file__).resolve().parents[2] / "static"
    for path in sorted(own.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(own)};".encode() + path.read_bytes())
    stamp = Path(settings.STATIC_ROOT) / STATIC_STAMP
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    say("collecting static files")
    call_command("collectstatic", interactive=False, verbosity=0)
    stamp.write_text(digest.hexdigest())


def compose(options: dict[str, Any], specs: Sequence[WorkerSpec]) -> state.ServerState:
    """Make the parts and join them; threads of writer and snapshot start here."""
    writer, metrics, snapshot, tokenizers = FactWriter(), Metrics(), SnapshotKeeper(), Tokenizers()
    plane = ControlPlane(ControlPlaneConfig(), settings.SLACKWATER_PLANE_SECRET)
    fleet = Fleet(plane, metrics, writer)
    live = LiveStats(
        classes=lambda: [facts.slo for facts in snapshot.current.classes.values()],
        view=fleet.view,
        gpu_hour_usd=settings.GPU_HOUR_USD,
        clock=time.monotonic,
    )
    fleet.live = live
    live.costs = CostBook(
        writer.put,
        lambda model_id: snapshot.current.gpu_hour_usd(model_id),
        secrets.token_hex(8),
    )
    gateway = Gateway(fleet, live, metrics, writer)
    snapshot.start()
    writer.start()
    current = state.ServerState(
        loop=event_loop(),
        fleet=fleet,
        gateway=gateway,
        costs=live.costs,
        host=HostMeter(settings.SLACKWATER_VAR),
        live=live,
        metrics=metrics,
        snapshot=snapshot,
        writer=writer,
        tokenizers=tokenizers,
        batches=BatchFeeder(gateway, fleet, writer, snapshot, tokenizers),
        workers=WorkerProcs(
            specs=specs,
            join_url=lambda: f"ws://{address(options, current)}/ws/worker",
            mint_token=fleet.mint_join_token,
            logs_dir=settings.SLACKWATER_VAR / "logs",
            environ=os.environ,
            restart=not options["no_restart_workers"],
            ended=fleet.start_failed,
        ),
        port=options["port"],
        profile=settings.SLACKWATER_PROFILE,
        started_at_s=time.monotonic(),
    )
    if settings.CELERY_BROKER_URL == settings.MEMORY_BROKER:
        current.side_work = SideWork()
        current.side_work.start()
    fleet.handle(current.contracts.start(snapshot.current, datetime.now(UTC)))
    return current


def address(options: dict[str, Any], current: state.ServerState) -> str:
    """host:port where this server reaches itself; the port is known once it listens."""
    host = options["bind"] if options["bind"] not in ("0.0.0.0", "::") else "127.0.0.1"
    return f"[{host}]:{current.port}" if ":" in host else f"{host}:{current.port}"


async def start(
    serving: Serving,
    options: dict[str, Any],
    show: demo.Demo | None,
    backend: LocalFleet | None,
) -> None:
    """The server listens: say where, start the workers and the demo."""
    current = serving.state
    base = address(options, current)
    say(f"console   http://{base}/")
    say(f"API       http://{base}/v1")
    say(f"health    http://{base}/readyz   metrics http://{base}/metrics")
    await livefeed.feed_of(current)  # charts begin now, not with the first page
    await current.workers.start()
    names = [proc.name for proc in current.workers.views()]
    say(f"workers   {', '.join(names) or 'none: start one with python -m gpuworkers --join …'}")
    if backend is not None:
        current.fleet.offer(backend)
        say(f"fleet     the plan runs {backend.limits[0]} to {backend.limits[1]} workers")
    say("stop with Ctrl-C")
    if show is not None:
        show.launch(current, serving.begin_drain)
