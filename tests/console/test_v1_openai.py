"""The official client against the real HTTP server: what OpenAI's users see."""

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.console import rawhttp
from tests.console.memoryserver import MODEL_ID, REVOKED_KEY
from tests.console.v1_app import TEXT

ROOT = Path(__file__).resolve().parents[2]
SAY = [{"role": "user", "content": "say"}]
FAIL = [{"role": "user", "content": "fail"}]


@pytest.fixture(scope="module")
def served():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.console.v1_app"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)},
    )
    port, key = process.stdout.readline().split()
    yield int(port), key.decode()
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def client(served):
    port, key = served
    with openai.OpenAI(
        api_key=key, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=30
    ) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL_ID, messages=SAY, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(TEXT.encode())
    assert answer.service_tier == "default" and answer.object == "chat.completion"


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL_ID, messages=SAY, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == TEXT
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > len(TEXT)


def test_completions_stop_and_limit(client):
    answer = client.completions.create(model=MODEL_ID, prompt="x", stop=["海"], max_tokens=100)
    assert answer.choices[0].text == TEXT.split("海")[0]
    answer = client.completions.create(model=MODEL_ID, prompt="x", max_tokens=5)
    assert answer.choices[0].text == TEXT[:5] and answer.choices[0].finish_reason == "length"
    streamed = client.completions.create(model=MODEL_ID, prompt="x", max_tokens=99, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == TEXT


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).owned_by == "slackwater"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_extras_travel_in_extra_body(client):
    answer = client.chat.completions.create(
        model=MODEL_ID,
        messages=SAY,
        service_tier="priority",
        extra_body={"top_k": 5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [1]},
        extra_headers={"x-slackwater-debug": "ids"},
    )
    assert answer.service_tier == "priority"
    assert answer.model_extra["slackwater"]["token_ids"] == list(TEXT.encode())


def test_failure_midway_is_an_error_of_the_stream(client):
    stream = client.chat.completions.create(model=MODEL_ID, messages=FAIL, stream=True)
    texts = []
    with pytest.raises(openai.APIError) as raised:
        for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == TEXT[:3]
    assert raised.value.code == "worker_error"


def test_failure_of_a_whole_answer_is_a_status(client):
    with pytest.raises(openai.InternalServerError) as raised:
        again = [{"role": "user", "content": "fail in another way"}]
        client.chat.completions.create(model=MODEL_ID, messages=again)
    assert raised.value.code == "worker_error"


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 1 << 20}, openai.BadRequestError, "max_tokens"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools[0]"),
        ({"extra_body": {"kv_transfer_params": {}}}, openai.BadRequestError, "kv_transfer_params"),
    ],
)  # fmt: skip
def test_bad_requests_raise_the_clients_own_errors(client, changes, error, param):
    arguments = {"model": MODEL_ID, "messages": SAY} | changes
    with pytest.raises(error) as raised:
        client.chat.completions.create(**arguments)
    assert raised.value.param == param
    assert raised.value.response.headers["x-request-id"]


def test_revoked_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key=REVOKED_KEY.text).models.list()


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/", "/v1/chat/completions/x"])
def test_unknown_path_over_the_wire_is_json(served, path):
    status, body = rawhttp.get(served[0], path)
    assert status == 404 and b'"unknown_url"' in body


def test_dropped_connection_frees_the_request(client):
    stream = client.chat.completions.create(model=MODEL_ID, messages=SAY, stream=True)
    next(iter(stream))
    stream.close()
    assert client.chat.completions.create(model=MODEL_ID, messages=SAY).choices
