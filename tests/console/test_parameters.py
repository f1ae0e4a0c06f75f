"""Every parameter of the official client is known by name, and each word of the tables is true."""

import inspect
import json

import openai
import pytest

from console import parameters
from console.options import CHOICES_MAX
from tests.console.memoryserver import MODEL_ID, MemoryServer

TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9")
CREATE = {
    "chat": (CLIENT.chat.completions.create, parameters.CHAT),
    "completions": (CLIENT.completions.create, parameters.COMPLETIONS),
    "responses": (CLIENT.responses.create, parameters.RESPONSES),
}
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    "completions": ("/v1/completions", {"prompt": "hi"}),
    "responses": ("/v1/responses", {"input": "hi"}),
}


async def call(server: MemoryServer, path: str, body: dict):
    return await server.call(path=path, body=json.dumps(body).encode())


@pytest.mark.parametrize("endpoint", CREATE)
def test_the_table_has_every_parameter_of_the_clients_create(endpoint):
    create, table = CREATE[endpoint]
    names = set(inspect.signature(create).parameters) - TRANSPORT
    assert names <= set(table), sorted(names - set(table))


def entries(kind: str) -> list[tuple[str, str]]:
    tables = {name: table for name, (_, table) in CREATE.items()}
    return [(e, n) for e, t in tables.items() for n, p in t.items() if p.kind == kind]


@pytest.mark.parametrize(("endpoint", "name"), entries("refused"))
async def test_a_refused_parameter_says_why_and_its_off_values_pass(endpoint, name):
    path, body = BODIES[endpoint]
    parameter = CREATE[endpoint][1][name]
    server = MemoryServer()
    refused = await call(server, path, {"model": MODEL_ID, **body, name: {"on": 1}})
    error = refused.json()["error"]
    assert (refused.status, error["param"]) == (400, name)
    assert parameter.note and parameter.note in error["message"]
    for off in (None, *parameter.off):
        passed = await call(server, path, {"model": MODEL_ID, **body, name: off})
        assert passed.status == 200, passed.body


@pytest.mark.parametrize(("endpoint", "name"), entries("ignored"))
async def test_an_ignored_parameter_changes_nothing(endpoint, name):
    path, body = BODIES[endpoint]
    server = MemoryServer()
    passed = await call(server, path, {"model": MODEL_ID, **body, name: "anything"})
    assert passed.status == 200 and CREATE[endpoint][1][name].note


async def test_n_is_bounded():
    path, body = BODIES["chat"]
    server = MemoryServer()
    at_limit = await call(server, path, {"model": MODEL_ID, **body, "n": CHOICES_MAX})
    assert len(at_limit.json()["choices"]) == CHOICES_MAX
    over = await call(server, path, {"model": MODEL_ID, **body, "n": CHOICES_MAX + 1})
    assert over.status == 400
