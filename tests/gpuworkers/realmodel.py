"""The converted SmolLM2, where this machine has it."""

import os
from pathlib import Path

from gpuworkers.convert import default_folder, is_converted
from tests import skips


def real_model_folder() -> Path:
    """SLACKWATER_TEST_MODEL, else the folder of the demo; skips the test where neither is there."""
    folder = Path(os.environ.get("SLACKWATER_TEST_MODEL") or default_folder())
    if not is_converted(folder):
        skips.missing("converted model")
    return folder
