"""The hand-kept schema of `/v1` names what the handlers serve, no more and no less."""

import json
import re

import pytest

from console import parameters, v1, v1resources
from tests.console.memoryserver import MemoryServer

SCHEMA = json.loads(v1.SCHEMA.read_text())
TABLES = {
    "/v1/chat/completions": ("ChatRequest", parameters.CHAT),
    "/v1/completions": ("CompletionRequest", parameters.COMPLETIONS),
    "/v1/responses": ("ResponseRequest", parameters.RESPONSES),
}


@pytest.mark.parametrize("path", TABLES)
def test_a_body_has_the_fields_of_its_table_with_their_notes(path):
    name, table = TABLES[path]
    schema = SCHEMA["components"]["schemas"][name]
    assert set(schema["properties"]) == set(table) and schema["additionalProperties"] is False
    for field, parameter in table.items():
        if parameter.kind != "used":
            described = schema["properties"][field]["description"]
            assert described == f"{parameter.kind.title()}: {parameter.note}."
        if parameter.kind == "refused":
            assert schema["properties"][field]["enum"] == [None, *parameter.off]


def methods(path: str) -> set[str]:
    return {name.upper() for name in SCHEMA["paths"][path] if name != "parameters"}


def test_every_served_path_and_method_is_described():
    described = set(SCHEMA["paths"])
    for path in v1._ENDPOINTS:
        assert methods(path) == {"POST"}
        described.remove(path)
    for pattern, allowed, _ in v1resources.ROUTES:
        (path,) = (p for p in described if pattern.fullmatch(re.sub(r"{\w+}", "x-1", p)))
        assert methods(path) == set(allowed)
        described.remove(path)
    assert described == {"/v1/models", "/v1/models/{model}"}


async def test_the_schema_is_served_without_a_key():
    served = await MemoryServer().call("GET", v1.SCHEMA_PATH, headers={"authorization": None})
    assert served.status == 200 and served.json() == SCHEMA
