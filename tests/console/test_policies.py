"""What the schedulers are told follows the strictest latency class."""

from console.policies import policy_for
from console.snapshot import EMPTY, ClassFacts, Snapshot
from controlplane.domain import SLOClass
from controlplane.kappas import KappaRow
from controlplane.protocol import Policy

KAPPAS = [KappaRow(0.5, 0.03, 0.7, 0.9, 0.0, 0.0), KappaRow(0.5, 0.05, 0.8, 0.9, 0.0, 0.0)]
INTERACTIVE = SLOClass("interactive", 0, ttft_s_p99=1.5, itl_s_p99=0.045)
FLEX = SLOClass("flex", 2, ttft_s_p99=10.0, itl_s_p99=0.2)
BATCH = SLOClass("batch", 3, 0.1, 0.001, is_batch=True, deadline_s=86_400.0)


def with_classes(*classes: SLOClass) -> Snapshot:
    facts = {slo.name: ClassFacts(slo, slo.name, 1.0, "") for slo in classes}
    return Snapshot(tenants={}, keys={}, models={}, classes=facts)


def test_strictest_latency_class_decides_and_batch_never_does():
    policy = policy_for(with_classes(FLEX, INTERACTIVE, BATCH), KAPPAS)
    assert policy == Policy.for_targets(1.5, 0.045, 0.8)
    assert policy.tau_idle_s == 0.05 * 1.5  # more than 0.8 of the ITL target


def test_nearest_row_of_the_table_gives_kappa():
    strict = SLOClass("strict", 0, ttft_s_p99=0.5, itl_s_p99=0.03)
    policy = policy_for(with_classes(strict), KAPPAS)
    assert (policy.kappa, policy.tau_idle_s) == (0.7, 0.05 * 0.5)


def test_without_a_latency_class_the_shipped_settings_stand():
    assert policy_for(EMPTY, KAPPAS) == policy_for(with_classes(BATCH), KAPPAS) == Policy()
