"""The plan from the command line, carried out by a real server and real worker processes."""

import json

import pytest

from tests.e2e.harness import MODELLED, Server, until

pytestmark = pytest.mark.serial
OTHER = "other-1b"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Server(
        tmp_path_factory.mktemp("var"),
        ("--workers", "mixed=2", "--engine", "fake", "--loadable", OTHER, "--workers-max", "3"),
    )
    served.start()
    yield served
    served.stop()


def plan(server: Server, *words: str) -> tuple[int, dict | list]:
    done = server.manage("plan", *words, "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def answer(server: Server, model_id: str) -> str:
    chat = server.client().chat.completions.create(
        model=model_id, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    return chat.choices[0].finish_reason


def test_override_loads_another_model_and_both_are_served(server):
    assert "the plan runs 1 to 3 workers" in server.log.read_text()
    code, done = plan(server, "override", "w1", "--model", OTHER, "--by", "ann")
    assert (code, done["state"], done["answer"]) == (0, "done", "ordered by ann")
    until(lambda: server.num_live() == 2, "the worker with its other model")
    assert answer(server, OTHER) == "length" and answer(server, MODELLED) == "length"
    _, rows = plan(server, "history")
    assert [(row["kind"], row["model_before"], row["model_after"]) for row in rows] == [
        ("model", MODELLED, OTHER)
    ]


def test_role_shadow_and_what_is_refused(server):
    code, done = plan(server, "override", "w2", "--role", "decode", "--by", "ann")
    assert (code, done["answer"]) == (0, "ordered by ann")
    _, status = plan(server, "status")
    assert status["mode"] == "auto" and status["newest"]["role_after"] == "decode"
    code, done = plan(server, "shadow", "on")
    assert (code, done["answer"]) == (0, "the planner's mode is shadow")
    assert plan(server, "status")[1]["mode"] == "shadow"
    code, done = plan(server, "override", "w2", "--model", "unheard-of")
    assert (code, done["state"], done["answer"]) == (1, "refused", "w2 cannot take unheard-of")
    code, done = plan(server, "rollback")
    assert code == 1 and "could be undone" in done["answer"]
