"""Static files: Plotly's one script out of its installed package, and names that always resolve."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.contrib.staticfiles.finders import BaseFinder
from django.core.checks import CheckMessage, Warning
from django.core.files.storage import FileSystemStorage
from whitenoise.storage import CompressedManifestStaticFilesStorage

PLOTLY_PATH = "plotly/plotly.min.js"


class PlotlyFinder(BaseFinder):
    """Exposes exactly one file of the package; its other data files are not published."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        spec = find_spec("plotly")  # locates the package without importing it
        assert spec is not None and spec.origin is not None, "plotly is a locked requirement"
        self.storage = FileSystemStorage(location=Path(spec.origin).parent / "package_data")
        self.storage.prefix = "plotly"  # type: ignore[attr-defined]

    def find(self, path: str, find_all: bool = False, **kwargs: Any) -> str | list[str]:
        hits = [self.storage.path("plotly.min.js")] if path == PLOTLY_PATH else []
        if find_all:
            return hits
        return hits[0] if hits else []

    def check(self, **kwargs: Any) -> list[CheckMessage]:
        if self.storage.exists("plotly.min.js"):
            return []
        return [Warning("plotly.min.js is not in the installed plotly package", id="console.W001")]

    def list(self, ignore_patterns: Any) -> Iterator[tuple[str, FileSystemStorage]]:
        yield "plotly.min.js", self.storage


class StaticStorage(CompressedManifestStaticFilesStorage):
    """Hashed, compressed names after collectstatic; plain names (served by the finders) before."""

    manifest_strict = False
    max_post_process_passes = 5
    keep_only_hashed_files = False

    def hashed_name(self, name: str, content: Any = None, filename: str | None = None) -> str:
        """The hashed name, or `name` itself for a file that was not collected."""
        if content is None and not self.exists(filename or name):
            return name
        return super().hashed_name(name, content, filename)
