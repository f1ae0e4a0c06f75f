"""What the workers' schedulers are told, from the SLO classes that are served."""

from collections.abc import Sequence

from msgspec import structs

from console.snapshot import Snapshot
from controlplane.kappas import KappaRow, kappa_for
from controlplane.protocol import Policy


def policy_for(snapshot: Snapshot, kappas: Sequence[KappaRow]) -> Policy:
    """For the strictest latency class: every class is served by the same workers."""
    targets = [facts.slo for facts in snapshot.classes.values() if not facts.slo.is_batch]
    if not targets:
        return Policy()
    itl_s = min(slo.itl_s_p99 for slo in targets)
    ttft_s = min(slo.ttft_s_p99 for slo in targets)
    policy = Policy.for_targets(ttft_s, itl_s, kappa_for(kappas, ttft_s, itl_s))
    return structs.replace(policy, top_rank=min(slo.rank for slo in targets))
