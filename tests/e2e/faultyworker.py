"""`python -m tests.e2e.faultyworker`: a modelled worker that fails on marked prompts. Takes the
options of `python -m gpuworkers`; the markers are ids of the byte-level vocabulary.
"""

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

from gpuworkers import config, fake
from gpuworkers.__main__ import follow_parent, no_load, serve
from gpuworkers.engine import Engine, EngineConfig

KILLS = ord("~")  # the process ends at once, as after a fault of the device
FAILS = ord("^")  # no id can be drawn, as from logits that are no numbers
FAILS_ON_ONE = ord("|")  # the same, on the first worker to see one, and always there


class FaultyRunner:
    """A Runner that looks at the prompts of the rows before and after a step."""

    def __init__(self, runner):
        self.runner = runner
        self.kv = runner.kv
        self.eos_token_ids = runner.eos_token_ids

    def run(self, plan, layer_written=None):
        if any(KILLS in prompt_of(row) for row in plan.rows):
            os._exit(13)
        result = self.runner.run(plan, layer_written)
        for index, row in enumerate(row for row in plan.rows if row.samples):
            prompt = prompt_of(row)
            if FAILS in prompt or (FAILS_ON_ONE in prompt and is_the_one()):
                result.token_ids[index] = None
        return result


def prompt_of(row):
    return row.sequence.token_ids[: row.sequence.prompt_tokens]


def is_the_one():
    """The first process to ask is."""
    claim = Path(tempfile.gettempdir()) / "the_one"
    with contextlib.suppress(FileExistsError), claim.open("x") as file:
        file.write(str(os.getpid()))
    return claim.read_text() == str(os.getpid())


def main(argv):
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    worker = config.parse(argv, os.environ)
    follow_parent(worker.parent_pid)
    runner, model, device, step_model = fake.load(worker.profile, worker.model_id, worker.kv_tokens)
    engine = Engine(FaultyRunner(runner), EngineConfig(), step_model, model, worker.role)
    asyncio.run(serve(worker, [(engine, device, no_load)]))


if __name__ == "__main__":
    main(sys.argv[1:])
