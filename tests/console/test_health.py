"""/readyz: each condition by itself, and what it says."""

from types import SimpleNamespace

import pytest

from console import health
from controlplane import domain
from tests.console.test_live import MODEL, WORKER, replaced


class Standing:
    """What readyz asks of the serving state, with values that the test changes."""

    def __init__(self):
        self.now_s = 50.0
        self.workers = (replaced(WORKER, models=(MODEL,)),)
        self.fleet = SimpleNamespace(
            now_s=lambda: self.now_s, view=lambda: domain.ClusterView(self.workers, (), (), ())
        )
        self.tick_at_s = 49.9
        self.database_failed_at_s = None
        self.draining = False


async def readyz(standing, query=b""):
    sent = []

    async def send(message):
        sent.append(message)

    await health.readyz(standing, query, send)
    return sent[0]["status"], sent[1]["body"].decode()


async def test_ready_says_ok_and_with_verbose_each_check():
    assert await readyz(Standing()) == (200, "ok\n")
    status, text = await readyz(Standing(), b"verbose")
    assert status == 200
    assert text.splitlines() == [
        "[+]database ok",
        "[+]control_loop ok",
        "[+]worker ok",
        "[+]accepting ok",
        "ok",
    ]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"database_failed_at_s": 49.0}, "database"),
        ({"tick_at_s": None}, "control_loop"),
        ({"tick_at_s": 49.6}, "control_loop"),
        ({"workers": ()}, "worker"),
        ({"workers": (WORKER,)}, "worker"),  # it serves no model
        ({"workers": (replaced(WORKER, models=(MODEL,), status="lost"),)}, "worker"),
        ({"draining": True}, "accepting"),
    ],
)
async def test_each_failed_check_is_named_and_answers_503(change, failed):
    standing = Standing()
    for name, value in change.items():
        setattr(standing, name, value)
    assert await readyz(standing) == (503, f"[-]{failed} failed\nnot ready\n")


async def test_database_that_failed_a_while_ago_is_well_again():
    standing = Standing()
    standing.database_failed_at_s = standing.now_s - health.DATABASE_QUIET_S - 0.1
    assert (await readyz(standing))[0] == 200


async def test_before_the_server_is_composed_nothing_is_ready():
    assert await readyz(None) == (503, "[-]server failed\nnot ready\n")
