"""Our control plane and scheduler on the recorded work of a comparison, in one setting for all.

The class is paced: its ITL target holds for the mean gap of a request, as the peer's rule for a
good request has it. Roles stay mixed: the planner only records.
"""

from collections.abc import Iterator, Sequence

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.sim.hardware import Hardware, StepTimes
from controlplane.sim.outcomes import ITL_S, TTFT_S, Gaps, Outcome
from controlplane.sim.peer import NUM_BLOCKS, STEP_TOKENS_MAX
from controlplane.sim.replay import Client, Record, Replay
from controlplane.sim.traces import HASH_TOKENS, TraceRequest

GAP_S_MAX = 0.4  # between two tokens of a paced request
SECONDS_AFTER = 1.0  # the last arrival
CLASS = domain.SLOClass("interactive", 0, TTFT_S, ITL_S, gap_s_max=GAP_S_MAX)
POLICY = protocol.Policy(chunk_tokens_max=STEP_TOKENS_MAX, step_tokens_max=STEP_TOKENS_MAX)


def build(times: StepTimes, workers: int, output_tokens_max: int, seed: int) -> Replay:
    """The cluster, nothing submitted."""
    device = Hardware(times, kv_tokens=NUM_BLOCKS * HASH_TOKENS, is_noisy=False)
    config = ControlPlaneConfig(prefix_block_tokens=HASH_TOKENS)
    client = Client(lambda row: CLASS, output_tokens_max, slow_s=ITL_S)
    replay = Replay(config, device, client, seed, block_tokens=HASH_TOKENS, policy=POLICY)
    for _ in range(workers):
        replay.add()
    replay.handle(domain.PlannerOrdered("shadow", "simulate"))
    return replay


def play(replay: Replay, rows: Sequence[TraceRequest], gaps: Gaps) -> Iterator[Outcome]:
    """Outcomes of the answered requests, in order of arrival."""
    records = replay.run(iter(rows), rows[-1].at_s + SECONDS_AFTER)
    for member in replay.members:
        for ms, count in enumerate(member.worker.gaps):
            gaps.add(ms / 1e3, count)
    yield from (outcome(record) for record in records if record.is_done)


def outcome(record: Record) -> Outcome:
    assert record.ttft_s is not None and record.ended_at_s is not None, record
    decode_s = record.ended_at_s - record.at_s - record.ttft_s
    return Outcome(record.ttft_s, decode_s, record.output_tokens - 1, record.num_slow)
