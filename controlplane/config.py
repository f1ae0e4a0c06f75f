"""Limits and weights of the control plane; each maximum has a test that stands at it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from controlplane.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ControlPlaneConfig:
    """Settings of one ControlPlane; nobody changes them later. Seconds, tokens and counts."""

    # sizes
    workers_max: int = 4096
    requests_max: int = 20_000  # queued and running, batch lines included
    queue_max: int = 1_000  # waiting requests of one online class
    tenants_max: int = 4_096  # fairness counters of tenants that wait for nothing
    prefix_blocks_max: int = 1_000_000
    prefix_holders_max: int = 8  # workers remembered for one block
    pairs_max: int = 4_096  # measured transfer rates
    plans_max: int = 50
    candidates_max: int = 8  # in one decision record
    records_max: int = 16  # of one request: the first and the latest
    decided_max: int = 4_096  # ended requests whose decisions are kept
    classes_max: int = 64
    requests_view_max: int = 500
    contracts_max: int = 4_096
    promises_max: int = 50_000  # retries that were promised room and have not come yet
    # liveness (design.md section 11)
    suspect_s_min: float = 1.5
    dead_s_min: float = 3.0
    stuck_s_min: float = 5.0  # a step in hand while heartbeats go on: no new work
    hung_s_min: float = 10.0  # and here it counts as dead
    lost_kept_s: float = 600.0  # a lost worker may come back with its resume proof
    stall_s: float = 1.0  # our own tick was late by more: silence is not held against workers
    # placement
    prefix_block_tokens: int = 16
    handoff_tokens_min: int = 128  # uncached tokens below which a prompt is never handed off
    transfer_setup_s: float = 0.02
    transfer_bytes_per_s: float = 200e6  # until a pair has been measured
    transfer_stale_s: float = 60.0  # without news of a pair, until a prompt tries it
    transfer_weight: float = 0.2  # of one transfer in the pair's running rate
    transfer_timeout_s: float = 30.0  # beyond four times the predicted prefill
    transfer_grace_s: float = 2.0  # beyond it for the decode worker to say that it gave up
    handoff_gain: float = 0.9  # transfer must cost less than this share of what it saves
    spill_share: float = 0.6  # local must be this much sooner when handoff misses its target
    sequences_max: int = 256  # online sequences on one worker
    batch_rows_max: int = 64  # batch sequences on one worker
    surplus_reserve: float = 0.125  # share of a worker's sequences that surplus never takes
    batch_line_tokens: float = 512.0  # of a line's KV, until a worker holds one
    batch_kv_reserve: float = 0.125  # share of a worker's blocks that batch never takes
    hold_s_min: float = 2.0  # prompts predicted before a new one; more stays in our queue
    moves_max: int = 5  # times that a request may lose its worker
    recovery_share: float = 0.2  # of live requests that may be retried at a time,
    recoveries_min: int = 3  # and at least so many; batch lines only beside no more than that
    evacuate_left_s: float = 2.0  # a stream that ends sooner stays with its worker
    evacuate_s_max: float = 10.0  # and so does what has not left by then
    moves_per_tick: int = 4  # streams that leave one worker at a time
    copy_tokens_min: int = 100  # of prompt, below which KV is computed again (algorithms.md 2h)
    strikes_max: int = 4  # workers that may die with a request, when others may be why
    errors_max: int = 2  # workers on which a sequence may fail, until the request is to blame
    quarantine_s: float = 600.0  # in which what was to blame is refused
    quarantined_max: int = 1_024  # fingerprints; the oldest go first
    avoid_s: float = 0.25  # after a rejection, doubled each time
    avoid_s_max: float = 4.0
    measure_all_max: int = 32  # workers of one role up to which all are measured for a request
    holders_measured: int = 2  # beyond: so many with the longest cached prefix,
    sampled_max: int = 4  # and so many by load;
    sampled_again: int = 32  # and so many more when none of them can take it
    fit_share: float = 0.3  # of the TTFT target: within it the fullest worker is best
    fit_itl_share: float = 0.8
    restore_share: float = 0.25  # cost of a prompt token from the host tier (algorithms.md 2c)
    replace_gain: float = 0.8  # a request not yet started moves when it starts within this share
    replaces_max: int = 2
    replace_scan: int = 16  # requests looked at in one tick
    left_s_max: float = 5.0  # a worker that dies so soon after it was left may have died of it
    replace_s_min: float = 0.2  # of predicted wait, below which nothing moves
    failures_max: int = 5  # in a row, until a worker is ejected
    slow_factor: float = 3.0
    slow_reports_min: int = 20
    ejected_s: float = 30.0
    ejected_share_max: float = 0.1  # of a pool's live workers, at least one
    scan_max: int = 16  # queue heads tried per class and event
    retry_every_s: float = 0.02  # between two passes over requests that found no room
    # admission
    late_margin: float = 0.05  # share of the TTFT target kept free (algorithms.md 2c, m)
    retry_s_min: float = 0.1
    # Of the cluster's prefill that promised retries may fill: about half of what it can do when it
    # decodes too, so that they fit beside the usual load once a burst is over.
    retry_share: float = 0.3
    retry_grace_s: float = 2.0  # a promised retry may come so much later than told
    # planner
    plan_every_s: float = 10.0
    plan_window_s: float = 30.0
    plan_dwell_s: float = 30.0
    forecast_bin_s: float = 60.0
    forecast_horizon_s: float = 120.0
    forecast_s_min: float = 1_200.0  # of history before the forecast's floor acts
    node_horizon_s: float = 240.0  # forecasts that decide how many workers run look so far ahead
    swap_move_s: float = 10.0  # a worker that changes its model finishes for so long, then it moves
    swap_retry_s: float = 1.0  # what it has; a worker that was busy is asked again after this
    swap_s: float = 30.0  # that a change of model takes, until one was measured
    cold_start_s: float = 20.0  # from StartWorker to its Hello, until one was measured
    start_s_max: float = 300.0  # a worker that has not joined by then has failed
    start_pause_s: float = 30.0  # after a start that failed, doubled with each in a row
    starts_max: int = 64  # workers that were started and have not joined
    operator_hold_s: float = 600.0  # the planner leaves a worker alone after an operator's order

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not value > 0:
                raise ConfigError(f"{spec.name}={value!r}: expected a number above 0")
        if self.dead_s_min <= self.suspect_s_min:
            raise ConfigError(
                f"dead_s_min={self.dead_s_min!r}: expected more than"
                f" suspect_s_min={self.suspect_s_min!r}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> "ControlPlaneConfig":
        """Settings by name; raises ConfigError for an unknown name, wrong type or bad value."""
        types = {spec.name: spec.type for spec in fields(cls)}
        known: dict[str, int | float] = {}
        for name, value in values.items():
            if name not in types:
                raise ConfigError(f"{name}={value!r}: unknown setting of the control plane")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or (types[name] is int and not isinstance(value, int)):
                raise ConfigError(f"{name}={value!r}: expected {types[name]}")
            assert isinstance(value, int | float)
            known[name] = value
        return cls(**known)  # type: ignore[arg-type]  # checked against the field types above
