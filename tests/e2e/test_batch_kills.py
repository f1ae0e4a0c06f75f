"""The server is killed in the middle of a batch: every line ends once, with the same output."""

import contextlib
import json
import random
import signal
import sqlite3

import pytest

from tests.e2e.harness import MODELLED, Server, until

LINES = 100
KILLS = 5


def write_batch(path):
    chance = random.Random(11)
    lines = []
    for index in range(LINES):
        words = " ".join(str(chance.randrange(1000)) for _ in range(chance.randrange(3, 60)))
        body = {
            "model": MODELLED,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": chance.randrange(100, 200),
            "temperature": 0,
        }
        lines.append(
            {
                "custom_id": f"job-{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
        )
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def submit(server, path):
    answer = server.manage("batch", "submit", str(path), "--tenant", "demo", "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)["id"]


def status(server, batch_id):
    answer = server.manage("batch", "status", batch_id, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def completed_lines(server, batch_id):
    """Asked of the database, since a command takes longer than many lines."""
    question = (
        "select count(*) from console_batchline join console_batch"
        " on console_batch.id = console_batchline.batch_id"
        " where console_batch.batch_id = ? and console_batchline.status = 'completed'"
    )
    with contextlib.closing(sqlite3.connect(server.var / "slackwater.sqlite3")) as database:
        return database.execute(question, (batch_id,)).fetchone()[0]


def texts(server, batch_id, path):
    """custom_id -> text of the fetched output; fails on a repeated id."""
    answer = server.manage("batch", "fetch", batch_id, "-o", str(path))
    assert answer.returncode == 0, answer.stderr
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["custom_id"] not in found, f"{row['custom_id']} twice"
        assert row["error"] is None
        found[row["custom_id"]] = row["response"]["body"]["choices"][0]["message"]["content"]
    return found


@pytest.mark.kill
@pytest.mark.timeout(600)
def test_a_batch_survives_five_kills_of_the_server(tmp_path):
    served = Server(
        tmp_path / "var",
        ("--workers", "prefill=1,decode=1", "--engine", "fake", "--profile", "h200-8b"),
    )
    jobs = write_batch(tmp_path / "jobs.jsonl")
    try:
        served.start()
        undisturbed = submit(served, jobs)
        until(lambda: status(served, undisturbed)["status"] == "completed", "the undisturbed run")
        expected = texts(served, undisturbed, tmp_path / "expected.jsonl")

        killed = submit(served, jobs)
        points = sorted(random.Random(5).sample(range(5, LINES - 10), KILLS))
        stopped_at = []
        for point in points:
            until(lambda point=point: completed_lines(served, killed) >= point, f"{point} lines")
            served.kill(signal.SIGKILL)
            stopped_at.append(completed_lines(served, killed))
            served.start()
        until(lambda: status(served, killed)["status"] == "completed", "the killed run")
        print(f"killed at {stopped_at} of {LINES} lines")
        assert stopped_at[-1] < LINES, "the last kill came too late"
        assert texts(served, killed, tmp_path / "seen.jsonl") == expected
        assert len(expected) == LINES
    finally:
        served.stop()
