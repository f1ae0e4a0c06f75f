"""Workers that serve Llama-3.1-8B on an H200 each, and requests to them, in virtual time."""

from controlplane import domain, protocol
from controlplane.sim.hardware import KV_TOKENS_8B, Hardware

MODEL = protocol.ModelFacts("llama-3.1-8b", "a" * 64, 131_072, 128_256, 131_072)
BLOCK_TOKENS = 64
CONCURRENCY_MAX = 100_000  # of a tenant: contracts limit it, if anything does


def hello(name: str, hardware: Hardware) -> protocol.Hello:
    """A worker that computes prompts and decodes, without handoff; its steps take what it has
    measured of itself."""
    return protocol.Hello(
        versions=[protocol.VERSION],
        name=name,
        engine="fake",
        engine_version="0",
        role="mixed",
        device=protocol.DeviceFacts("modelled", "H200", 141 << 30, 132, "bf16"),
        models=[MODEL],
        block_tokens=BLOCK_TOKENS,
        num_blocks=KV_TOKENS_8B // BLOCK_TOKENS,
        step_model=hardware.profile(),
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
