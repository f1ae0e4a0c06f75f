"""Keeps what a worker has learned of its step times, one file for each model, device and version.

A file appears whole or not at all; one that cannot be read is as good as none."""

import hashlib
import logging
import os
from pathlib import Path

import msgspec

from controlplane.latency import LatencyModel, read_saved

ENGINE_VERSION = "2"  # raise it when a step's cost changes

logger = logging.getLogger(__name__)


def path_for(model_id: str, device: str) -> Path:
    """$SLACKWATER_CACHE/latency/…, else below the XDG cache. The name says nothing of the model
    that could not stand in a file name."""
    cache = os.environ.get("SLACKWATER_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) if cache else Path(xdg) / "slackwater"
    name = hashlib.sha256(f"{model_id}\n{device}".encode()).hexdigest()[:16]
    return folder / "latency" / f"{name}.json"


def restore(step_model: LatencyModel, model_id: str, device: str) -> bool:
    """Let the model go on from its file; False without a usable one."""
    path = path_for(model_id, device)
    try:
        saved = read_saved(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return False
    if (saved.model_id, saved.device) != (model_id, device):
        return False
    step_model.restore(saved, ENGINE_VERSION)
    logger.info(
        "restored latency model=%s device=%s scores=%d", model_id, device, len(saved.scores)
    )
    return True


def save(step_model: LatencyModel, model_id: str, device: str) -> Path:
    """Write the model's file."""
    path = path_for(model_id, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(step_model.save(model_id, device, ENGINE_VERSION))
    partial.replace(path)
    return path
