"""Workers that serve Llama-3.1-8B on an H200 each, and requests to them, in virtual time.

Steps take what the step model fitted to a table of the device says: its form is the one that
predictions use, its coefficients are the closest to the table that are not negative.
"""

from pathlib import Path

import msgspec
import numpy as np

from controlplane import domain, protocol
from controlplane.latency import StepFeatures
from controlplane.sim.steptable import NAMES, StepTable, TableFile, load

MODEL = protocol.ModelFacts("llama-3.1-8b", "a" * 64, 131_072, 128_256, 131_072)
BLOCK_TOKENS, NUM_BLOCKS = 64, 12_800  # 0.82 M tokens of KV, algorithms.md section 0
CONCURRENCY_MAX = 100_000  # of a tenant: contracts limit it, if anything does

DECODE_ROWS = (1, 8, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 4096)  # tokens of a decode row
CHUNKS = (0, 64, 128, 256, 512, 1024, 2048)
ROUNDS_MAX = 16  # one coefficient leaves in each


def read_table(calibration: Path | None, name: str = NAMES[0]) -> StepTable:
    """The table of that model from a calibration file (h200_steps.json), or else the shipped one.
    Raises OSError, or ValueError for a file without it."""
    if calibration is None:
        return load(name)
    tables = msgspec.json.decode(calibration.read_bytes(), type=dict[str, dict[str, object]])
    if name not in tables:
        raise ValueError(f"{calibration}: no table {name!r}, it has {', '.join(sorted(tables))}")
    source = f"AIConfigurator, read from {calibration.name}"
    return StepTable(msgspec.convert({"name": name, "source": source} | tables[name], TableFile))


def step_model(table: StepTable) -> protocol.StepModel:
    """Least squares of relative errors over decode, prompt and mixed steps."""
    vectors, seconds = [], []
    for chunk in CHUNKS:
        for rows in (0, *DECODE_ROWS):
            for context in CONTEXTS:
                features = StepFeatures(rows, rows * context)
                if chunk:
                    features = features.with_tokens(0, chunk)
                if features.rows:
                    vectors.append(features.vector())
                    seconds.append(
                        table.step_s([(0, chunk)] if chunk else [], rows, rows * context)
                    )
    weighted = np.array(vectors) / np.array(seconds)[:, None]
    kept = list(range(weighted.shape[1]))
    for _ in range(ROUNDS_MAX):
        found = np.linalg.lstsq(weighted[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0.0).all():
            break
        kept.remove(kept[int(found.argmin())])
    values = np.zeros(weighted.shape[1])
    values[kept] = np.maximum(found, 0.0)
    base, token, over, over_more, context_s, chunk_s, sequence = (float(v) for v in values)
    return protocol.StepModel(base, token, context_s, (over, over_more), sequence, chunk_s)


def hello(name: str, model: protocol.StepModel) -> protocol.Hello:
    """A worker that computes prompts and decodes, without handoff."""
    return protocol.Hello(
        versions=[protocol.VERSION],
        name=name,
        engine="fake",
        engine_version="0",
        role="mixed",
        device=protocol.DeviceFacts("modelled", "H200", 141 << 30, 132, "bf16"),
        models=[MODEL],
        block_tokens=BLOCK_TOKENS,
        num_blocks=NUM_BLOCKS,
        step_model=model,
        token="t",
    )


def prompt_ids(index: int, tokens: int) -> list[int]:
    """A prompt that shares no block with one of another index."""
    return [index, *[0] * (tokens - 1)]


def request(
    request_id: str, tenant_id: str, slo: domain.SLOClass, tokens: tuple[int, int], now_s: float
) -> domain.GenerateRequest:
    """`tokens`: of the prompt, and of the output at most."""
    return domain.GenerateRequest(
        request_id, tenant_id, MODEL.model_id, slo, *tokens, (), now_s, CONCURRENCY_MAX
    )
