"""Secrets of a local installation, generated once into `var/secrets.json` (mode 0600)."""

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path

from controlplane.errors import ConfigError

KEYS = ("secret_key", "pepper")


def load_or_create(path: Path) -> dict[str, str]:
    """The secrets of `path`, created when absent; safe when several processes start at once.

    Raises ConfigError when the file is there but is not ours: a new secret would lock out all keys.
    """
    if not path.exists():
        _create(path)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable ({error}); restore it or remove it") from None
    if not isinstance(values, dict) or any(not isinstance(values.get(k), str) for k in KEYS):
        raise ConfigError(f"{path}: expected the keys {', '.join(KEYS)}; restore it or remove it")
    return {key: values[key] for key in KEYS}


def _create(path: Path) -> None:
    """Write a complete file under another name, then link it: the first of several wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".secrets-")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({key: secrets.token_urlsafe(48) for key in KEYS}, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was first; its file is as complete as ours
    finally:
        os.unlink(temporary)


def derive(secret_key: str, purpose: str) -> bytes:
    """A 32-byte key for one purpose (HMAC-SHA256 of its name)."""
    return hmac.new(secret_key.encode(), purpose.encode(), hashlib.sha256).digest()
