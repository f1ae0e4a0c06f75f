"""Makes the modelled engine fail on marked prompts; on the PYTHONPATH of a server, so that each
worker process it starts runs this first. The markers are ids of the byte-level vocabulary.
"""

import os
import sys
import tempfile
from pathlib import Path

KILLS = ord("~")  # the process ends at once, as after a fault of the device
FAILS = ord("^")  # no id can be drawn, as from logits that are no numbers
FAILS_ON_ONE = ord("|")  # the same, on the first worker to see one, and always there


def install() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from gpuworkers import fake

    class FaultyRunner(fake.FakeRunner):
        """Looks at the prompts of the rows before and after a step."""

        def run(self, plan, layer_written=None):
            if any(KILLS in prompt_of(row) for row in plan.rows):
                os._exit(13)
            result = super().run(plan, layer_written)
            sampling = [row for row in plan.rows if row.samples]
            for index, row in enumerate(sampling):
                prompt = prompt_of(row)
                if FAILS in prompt or (FAILS_ON_ONE in prompt and is_the_one()):
                    result.token_ids[index] = None
            return result

    fake.FakeRunner = FaultyRunner


def is_the_one() -> bool:
    """The first process to ask is."""
    claim = Path(tempfile.gettempdir()) / "the_one"
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        pass
    return claim.read_text() == str(os.getpid())


def prompt_of(row) -> list[int]:
    return row.sequence.token_ids[: row.sequence.prompt_tokens]


if "gpuworkers" in sys.orig_argv:
    install()
