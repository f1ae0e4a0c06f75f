"""The database tests once more on PostgreSQL, in a process with its settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_models.py", "test_snapshot.py", "test_writer.py", "test_batches.py")


@pytest.mark.services
def test_rows_behave_alike_on_postgresql(tmp_path: Path) -> None:
    url = skips.service_url("SLACKWATER_TEST_DATABASE_URL")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            "--ds=console.settings",
            *(f"tests/console/{name}" for name in FILES),
        ],
        cwd=ROOT,
        env={**environ, "DATABASE_URL": url, "SLACKWATER_VAR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
