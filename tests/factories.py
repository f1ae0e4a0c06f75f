"""Valid objects of the control plane with plain defaults; a test names only what it is about."""

from controlplane import domain, protocol

INTERACTIVE = domain.SLOClass("interactive", 0, ttft_s_p99=4.0, itl_s_p99=0.2)
BATCH = domain.SLOClass("batch", 3, 60.0, 10.0, is_batch=True, deadline_s=86_400.0)
CPU_STEP = protocol.StepModel(base_s=0.045, per_token_s=0.003, per_context_token_s=1e-6)
MODEL = protocol.ModelFacts("smollm2-135m", "a" * 64, 2048, 49_152, 46_080)


def make_hello(
    role: protocol.Role = "mixed",
    *,
    name: str = "worker",
    models: tuple[protocol.ModelFacts, ...] = (MODEL,),
    num_blocks: int = 2048,
    block_tokens: int = 16,
    step_model: protocol.StepModel = CPU_STEP,
    handoff_address: str | None = "127.0.0.1:9",
    dtype: str = "fp32",
    versions: tuple[int, ...] = (protocol.VERSION,),
    token: str | None = "t",
    resume: protocol.ResumeProof | None = None,
    sequences: tuple[protocol.LiveSequence, ...] = (),
    loadable: tuple[str, ...] = (),
) -> protocol.Hello:
    return protocol.Hello(
        versions=list(versions),
        name=name,
        engine="fake",
        engine_version="0",
        role=role,
        device=protocol.DeviceFacts("modelled", "test", 1 << 30, 0, dtype),
        models=list(models),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        step_model=step_model,
        handoff_address=handoff_address,
        token=None if resume else token,
        resume=resume,
        sequences=list(sequences),
        loadable=list(loadable),
    )


def make_load(
    role: protocol.Role = "mixed",
    *,
    step_index: int = 1,
    predicted_s: float = 0.05,
    online_s: float = 0.0,
    batch_s: float = 0.0,
    running_online: int = 0,
    running_batch: int = 0,
    prefill_tokens_waiting: int = 0,
    kv_blocks_total: int = 2048,
    kv_blocks_free: int = 2048,
    kv_blocks_held_batch: int = 0,
    step_model: protocol.StepModel = CPU_STEP,
) -> protocol.WorkerLoad:
    return protocol.WorkerLoad(
        role=role,
        step_index=step_index,
        predicted_s=predicted_s,
        measured_s=predicted_s,
        online_s=online_s,
        batch_s=batch_s,
        idle_s=0.0,
        rows_online=running_online,
        rows_batch=running_batch,
        running_online=running_online,
        running_batch=running_batch,
        waiting_online=0,
        waiting_batch=0,
        prefill_tokens_waiting=prefill_tokens_waiting,
        context_tokens_running=0,
        kv_blocks_total=kv_blocks_total,
        kv_blocks_free=kv_blocks_free,
        kv_blocks_cached=0,
        kv_blocks_held_batch=kv_blocks_held_batch,
        step_model=step_model,
    )


def make_request(
    request_id: str = "r1",
    *,
    tenant_id: str = "acme",
    model_id: str = MODEL.model_id,
    slo: domain.SLOClass = INTERACTIVE,
    prompt_tokens: int = 32,
    output_tokens_max: int = 16,
    block_hashes: tuple[bytes, ...] = (),
    arrived_at_s: float = 0.0,
    tenant_concurrency_max: int = 100,
    fingerprint: bytes = b"",
    key_id: str = "",
    weight: float = 1.0,
) -> domain.GenerateRequest:
    return domain.GenerateRequest(
        request_id=request_id,
        tenant_id=tenant_id,
        model_id=model_id,
        slo=slo,
        prompt_tokens=prompt_tokens,
        output_tokens_max=output_tokens_max,
        block_hashes=block_hashes,
        arrived_at_s=arrived_at_s,
        tenant_concurrency_max=tenant_concurrency_max,
        fingerprint=fingerprint,
        key_id=key_id,
        weight=weight,
    )
