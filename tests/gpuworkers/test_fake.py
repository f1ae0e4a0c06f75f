"""The modelled engine: same ids on every worker and for every split, wrong KV gives wrong ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import protocol
from controlplane.errors import ConfigError
from controlplane.latency import StepFeatures, step_s
from gpuworkers import fake
from gpuworkers.engine import Engine
from gpuworkers.fake import FakeKV, FakeRunner
from gpuworkers.scheduler import Plan, PlanRow
from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.stubconsole import assign, make_engine

STEP = fake.PROFILES["cpu-fast"].step


def outputs(engine: Engine, *messages: protocol.Assign) -> list[list[int]]:
    """Runs the engine to the end of all of them."""
    found: dict[str, list[int]] = {message.request_id: [] for message in messages}
    for message in messages:
        assert isinstance(engine.assign(message, 0.0), protocol.Accepted)
    now_s = 0.0
    while engine.has_work():
        result = engine.step(now_s, lambda: 0.0)
        now_s += result.measured_s
        for report in result.sequences:
            found[report.request_id] += report.token_ids
    engine.check_integrity()
    return list(found.values())


def compute(cuts: list[int], token_ids: list[int], kv: FakeKV, block_ids: list[int]) -> int:
    """The hash at the end of token_ids, computed in chunks that end at `cuts`."""
    sequence = from_assign(assign("r", token_ids), 0.0)
    sequence.block_ids = block_ids
    value, start = 0, 0
    for end in [*cuts, len(token_ids)]:
        if end > start:
            value = FakeRunner(kv, STEP)._compute(PlanRow(sequence, start, end - start, True))
            start = end
    return value


@given(
    st.lists(st.integers(0, 1023), min_size=1, max_size=100),
    st.lists(st.integers(1, 99), max_size=6),
)
def test_hash_does_not_depend_on_the_chunks(token_ids: list[int], cuts: list[int]) -> None:
    cuts = sorted(cut for cut in cuts if cut < len(token_ids))
    whole = compute([], token_ids, FakeKV(8, 16), [0, 1, 2, 3, 4, 5, 6])
    assert compute(cuts, token_ids, FakeKV(8, 16), [7, 2, 5, 0, 3, 1, 6]) == whole


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_every_token_counts_at_block_boundaries(length: int) -> None:
    token_ids = list(range(length))
    values = {compute([], token_ids, FakeKV(8, 16), [0, 1, 2])}
    for index in range(length):
        changed = token_ids[:index] + [1000] + token_ids[index + 1 :]
        values.add(compute([], changed, FakeKV(8, 16), [0, 1, 2]))
    assert len(values) == length + 1


@pytest.mark.parametrize("layer", range(fake.LAYERS))
@pytest.mark.parametrize("byte", range(fake.BLOCK.size))
def test_any_changed_byte_of_a_block_changes_what_is_read(layer: int, byte: int) -> None:
    kv = FakeKV(4, 16)
    kv.store(2, 31, 123456789)
    assert kv.load(2, 31) == 123456789
    data = bytearray(kv.read(layer, [2]))
    data[byte] ^= 1
    kv.write(layer, [2], data)
    assert kv.load(2, 31) != 123456789


def test_kv_of_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks"):
        FakeKV(4, 16).write(0, [1, 2], bytes(16))


def test_output_is_the_same_alone_in_a_batch_and_from_the_prefix_cache() -> None:
    prompt = [(5 * i) % 250 for i in range(100)]
    (alone,) = outputs(make_engine(), assign("r", prompt, 30))
    messages = [assign(f"r{n}", [n, *prompt], 30) for n in range(6)]
    assert outputs(make_engine(), assign("r", prompt, 30), *messages)[0] == alone
    engine = make_engine()
    assert outputs(engine, assign("first", prompt, 30)) == [alone]
    assert outputs(engine, assign("again", prompt, 30)) == [alone]
    assert len(alone) == 30 and len(set(alone)) > 5
    assert bytes(alone).decode().strip(" abcdefghijklmnopqrstuvwxyz") == ""


def sampled(seed: int, choice: int = 0, temperature: float = 1.0) -> list[int]:
    sampling = protocol.Sampling(20, temperature, seed=seed, choice_index=choice)
    (ids,) = outputs(make_engine(), assign("r", [1, 2, 3], sampling=sampling))
    return ids


def test_seed_and_choice_change_sampled_output_and_only_that() -> None:
    assert sampled(1) == sampled(1)
    assert len({tuple(ids) for ids in (sampled(1), sampled(2), sampled(1, choice=1))}) == 3
    assert sampled(1, temperature=0.0) == sampled(2, temperature=0.0)
    assert sampled(-1) == sampled((1 << 64) - 1)


def test_sampled_output_goes_on_the_same_after_failover() -> None:
    sampling = protocol.Sampling(20, 1.0, seed=7)
    (whole,) = outputs(make_engine(), assign("r", [1, 2, 3], sampling=sampling))
    resumed = assign("r", [1, 2, 3], epoch=2, sampling=sampling, delivered=whole[:8])
    assert outputs(make_engine(), resumed) == [whole[8:]]


def test_step_time_is_the_profiles() -> None:
    sequence: Sequence = from_assign(assign("r", [1, 2, 3]), 0.0)
    sequence.block_ids = [0]
    features = StepFeatures().with_tokens(0, 3)
    plan = Plan((PlanRow(sequence, 0, 3, True),), 1, features, 0.0, 1.0, 1.0)
    result = FakeRunner(FakeKV(1, 16), STEP).run(plan)
    assert result.modelled_s == step_s(STEP, features) and len(result.token_ids) == 1


@pytest.mark.parametrize(
    ("batch", "context", "table_ms"),
    [(1, 4096, 4.954), (32, 4096, 9.17), (64, 4096, 13.616), (128, 4096, 20.982),
     (256, 4096, 38.116), (256, 256, 9.879), (64, 16384, 36.25)],
)  # fmt: skip
def test_h200_decode_steps_are_within_a_fifth_of_the_calibration(
    batch: int, context: int, table_ms: float
) -> None:
    features = StepFeatures(batch, batch * context)
    assert step_s(fake.PROFILES["h200-8b"].step, features) * 1000 == pytest.approx(table_ms, 0.2)


@pytest.mark.parametrize(("tokens", "table_ms"), [(1024, 21.18), (2048, 43.402), (8192, 198.872)])
def test_h200_prefills_are_within_a_fifth_of_the_calibration(tokens: int, table_ms: float) -> None:
    features = StepFeatures().with_tokens(0, tokens)
    assert step_s(fake.PROFILES["h200-8b"].step, features) * 1000 == pytest.approx(table_ms, 0.2)


def test_kv_room_can_be_set_in_tokens() -> None:
    assert make_engine(kv_tokens=160).pool.num_blocks == 10


@pytest.mark.parametrize(("profile", "kv_tokens"), [("tpu", 0), ("cpu-fast", 15)])
def test_impossible_settings_are_named(profile: str, kv_tokens: int) -> None:
    with pytest.raises(ConfigError, match="--profile=tpu|--kv-tokens=15"):
        fake.load(profile, "modelled-8b", kv_tokens)
