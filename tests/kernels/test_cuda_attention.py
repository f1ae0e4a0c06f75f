"""CUDA attention over paged KV against float64: decoding, chunks, mixed steps, captured buckets."""

import numpy as np
import pytest
import torch

from kernels.cuda import backend, plan
from kernels.ops import Heads, SequenceTokens
from kernels.reference import ReferenceOps
from tests.kernels.cudakit import BLOCK, assert_attention, assert_near, cache, sequences, values

SMOL = Heads(6, 2, 64)
WIDE = Heads(8, 1, 128)
BOUNDARIES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]


def test_decoding_agrees_at_every_boundary_of_block_tile_and_piece(kit):
    assert_attention(kit, [(length - 1, 1) for length in BOUNDARIES], SMOL)


def test_a_long_context_is_cut_into_pieces_and_added_up_again(kit):
    steps, _ = sequences([(1500, 1), (3, 1)])
    step = kit.ops.plan_step(steps, SMOL, BLOCK)
    assert step.pieces.view(-1, plan.PIECE_FIELDS)[0, 6] > 1
    assert_attention(kit, [(1500, 1), (3, 1)], SMOL)


def test_a_step_leaves_its_arrivals_as_it_found_them(kit):
    """Else a captured step could be replayed once only."""
    steps, num_blocks = sequences([(1500, 1), (700, 1)])
    ops = kit.ops
    step = ops.plan_step(steps, SMOL, BLOCK)
    q, kv = kit.on(values(2, 6, 64)), kit.on(cache(num_blocks, SMOL))
    first = ops.attention(q, kv, step)
    assert not step.arrivals.any()
    assert torch.equal(ops.attention(q, kv, step), first)


@pytest.mark.parametrize("heads", [WIDE, Heads(4, 4, 16)])
def test_any_grouping_of_heads_decodes_and_prefills(kit, heads):
    assert_attention(kit, [(69, 1), (7, 9), (320, 1), (60, 10)], heads)


@pytest.mark.parametrize(
    "start,count", [(0, 2), (0, 21), (0, 22), (7, 9), (60, 10), (0, 65), (64, 64), (150, 21)]
)
def test_a_chunk_agrees_with_the_reference(kit, start, count):
    assert_attention(kit, [(start, count)], SMOL)


def test_a_step_mixes_chunks_and_decoding_in_any_order(kit):
    assert_attention(kit, [(5, 3), (40, 1), (0, 30), (0, 1), (16, 17)], SMOL)


@pytest.mark.parametrize("start", [0, 37])
def test_a_long_chunk_goes_through_torch_and_agrees(kit, start, monkeypatch):
    monkeypatch.setattr(plan, "SDPA_TOKENS_MIN", 48)
    steps, _ = sequences([(4, 1), (start, 50)])
    assert kit.ops.plan_step(steps, SMOL, BLOCK).long_chunks == (plan.LongChunk(1, 1, start, 50),)
    assert_attention(kit, [(4, 1), (start, 50)], SMOL)


def test_a_first_chunk_is_padded_to_one_of_few_lengths():
    """And none is more than a quarter longer than it has to be."""
    padded = [plan.padded_tokens(n) for n in range(512, 8193)]
    assert len(set(padded)) == 4 * plan.PADS_PER_OCTAVE + 1
    assert all(n <= more < 1.25 * n for n, more in zip(range(512, 8193), padded, strict=True))


def test_all_lengths_of_first_chunks_are_met_beforehand(kit, monkeypatch):
    met = []
    attention = backend._long_attention
    monkeypatch.setattr(
        backend, "_long_attention", lambda q, *rest: met.append(q.shape) or attention(q, *rest)
    )
    monkeypatch.setattr(plan, "SDPA_TOKENS_MIN", 48)
    kit.ops.prepare_chunks(SMOL, 70)
    prepared = list(met)
    assert [tokens for tokens, _, _ in prepared] == [48, 48, 56, 56, 64, 64, 80, 80]
    assert_attention(kit, [(0, 50), (0, 70)], SMOL)
    assert met[8:] and set(met[8:]) <= set(prepared)


def test_the_answer_is_visible_by_eye_for_one_hot_keys(kit):
    """A query that points strongly at one key returns that key's value."""
    heads = Heads(1, 1, 16)
    kv = torch.zeros(2, 2, 1, BLOCK, 16).bfloat16()
    kv[1, 0, 0, 2, 3] = 1000.0
    kv[1, 1, 0, 2] = torch.arange(16)
    q = torch.zeros(1, 1, 16).bfloat16()
    q[0, 0, 3] = 1.0
    step = kit.ops.plan_step([SequenceTokens(4, 1, np.array([1]))], heads, BLOCK)
    made = kit.ops.attention(kit.on(q), kit.on(kv), step)
    assert made.tolist() == [list(map(float, range(16)))]


def test_rows_beyond_the_sequence_in_its_last_block_do_not_count(kit):
    steps, num_blocks = sequences([(19, 1), (0, 20)])
    kv, q, ops = cache(num_blocks, SMOL), values(21, 6, 64), kit.ops
    step = ops.plan_step(steps, SMOL, BLOCK)
    before = ops.attention(kit.on(q), kit.on(kv), step)
    for sequence in steps:
        kv[sequence.table[1], :, :, 4:] = 1e30
    assert torch.equal(ops.attention(kit.on(q), kit.on(kv), step), before)


def test_queries_may_lie_in_wider_rows_as_rope_leaves_them(kit):
    steps, num_blocks = sequences([(40, 1), (9, 4)])
    qkv, kv = values(5, 10, 64), cache(num_blocks, SMOL)
    ops = kit.ops
    step = ops.plan_step(steps, SMOL, BLOCK)
    wide = ops.attention(kit.on(qkv)[:, :6], kit.on(kv), step)
    assert torch.equal(wide, ops.attention(kit.on(qkv[:, :6].contiguous()), kit.on(kv), step))


# --- steps of fixed shape ------------------------------------------------------------------------


def test_a_bucket_filled_again_sees_the_next_step_at_the_same_addresses(kit):
    ops = kit.ops
    bucket = ops.decode_bucket(6, 40, SMOL, BLOCK)
    address = bucket.numbers.data_ptr()
    for spans in ([(30, 1), (600, 1)], [(n, 1) for n in (1, 2, 3, 4, 5, 500)], [(0, 1)]):
        steps, num_blocks = sequences(spans)
        ops.refill(bucket, steps)
        q, kv = values(6, 6, 64), cache(num_blocks, SMOL)
        made = ops.attention(kit.on(q), kit.on(kv), bucket)[: len(spans)]
        reference = ReferenceOps()
        exact = reference.attention(
            q[: len(spans)].double(), kv, reference.plan_step(steps, SMOL, BLOCK)
        )
        assert_near(made, exact)
        assert bucket.numbers.data_ptr() == address


def test_a_bucket_refuses_what_does_not_fit(kit):
    ops = kit.ops
    bucket = ops.decode_bucket(2, 4, SMOL, BLOCK)
    ops.refill(bucket, sequences([(63, 1), (0, 1)])[0])
    with pytest.raises(ValueError, match="bucket of 2 rows"):
        ops.refill(bucket, sequences([(0, 1)] * 3)[0])
    with pytest.raises(ValueError, match="bucket of 2 rows"):
        ops.refill(bucket, sequences([(0, 2)])[0])
    with pytest.raises(ValueError, match="5 blocks"):
        ops.refill(bucket, sequences([(64, 1)])[0])
    with pytest.raises(ValueError, match="17 tokens need 2"):
        ops.refill(bucket, [SequenceTokens(16, 1, np.array([0]))])


@pytest.mark.parametrize("lanes", [1, 4, 33])
@pytest.mark.parametrize(
    "lengths", [[1], [5000], [4096] * 64, [32_768] + [1000] * 63, list(range(1, 300, 7)), []]
)
def test_pieces_cover_every_context_once_and_every_lane_has_its_stretch(lengths, lanes):
    pieces, lane_first = plan.cut(np.array(lengths, dtype=np.int64), lanes)
    assert len(pieces) <= len(lengths) + lanes
    assert lane_first.tolist() == sorted(lane_first.tolist())
    assert (lane_first[0], lane_first[-1]) == (0, len(pieces))
    covered = [[] for _ in lengths]
    for _, row, first, end, *places in pieces.tolist():
        assert first % plan.UNIT_TOKENS == 0 and first < end
        covered[row].append((first, end, places))
    used = []
    for row, length in enumerate(lengths):
        parts = covered[row]
        assert [first for first, _, _ in parts] == [0, *(end for _, end, _ in parts[:-1])]
        assert parts[-1][1] == length
        places = [place for _, _, (place, _, _) in parts]
        if len(parts) == 1:
            assert places == [-1]
            continue
        assert all(row_of == [places[0], len(parts)] for _, _, (_, *row_of) in parts)
        used += places
    assert used == list(range(len(used)))


@pytest.mark.parametrize(
    "lengths", [[32_768] + [1000] * 63, [4096] * 64, [1024] * 256, list(range(1, 9000, 37))]
)
def test_lanes_have_equal_work_however_the_lengths_differ(lengths):
    lengths, lanes = np.array(lengths), 33
    pieces, first = plan.cut(lengths, lanes)
    tokens = pieces[:, 3] - pieces[:, 2]
    cost = -(-tokens // plan.UNIT_TOKENS) + (pieces[:, 2] == 0) * plan.ROW_COST_UNITS
    work = [int(cost[first[lane] : first[lane + 1]].sum()) for lane in range(lanes)]
    assert max(work) <= sum(work) / lanes + 1 + plan.ROW_COST_UNITS
