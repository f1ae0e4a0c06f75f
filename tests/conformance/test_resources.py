"""Models, files, batches, errors, limits and idempotency, by OpenAI's own client."""

import json
import time

import openai
import pytest

from tests.conformance.conftest import MODEL
from tests.e2e.harness import until

pytestmark = [pytest.mark.slow, pytest.mark.serial]
SAY = [{"role": "user", "content": "Name a colour."}]
URL = "/v1/chat/completions"
PREDICTION = {"type": "content", "content": "x"}
BAD_TOOL = {"type": "function", "function": {"name": "a b"}}
BAD_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}


def lines(count: int, **body) -> bytes:
    made = []
    for index in range(count):
        request = {"model": MODEL, "messages": SAY, "max_tokens": 4, "temperature": 0.0} | body
        made.append({"custom_id": f"c{index}", "method": "POST", "url": URL, "body": request})
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def upload(client, content: bytes, name: str = "in.jsonl"):
    return client.files.create(file=(name, content), purpose="batch")


# --- models and files ----------------------------------------------------------------------------


def test_models_are_listed(client):
    assert MODEL in [model.id for model in client.models.list().data]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_file_comes_back_as_it_went(client):
    content = lines(2)
    made = upload(client, content)
    assert made.bytes == len(content) and made.purpose == "batch" and made.status == "processed"
    assert client.files.retrieve(made.id).filename == "in.jsonl"
    assert client.files.content(made.id).content == content


def test_files_are_listed_in_pages(client):
    ids = [upload(client, lines(1)).id for _ in range(3)]
    listed = [file.id for file in client.files.list(limit=2)]  # the client follows the pages
    assert [i for i in listed if i in ids] == ids[::-1]


def test_a_file_expires_when_told(client):
    made = client.files.create(
        file=("in.jsonl", lines(1)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at - made.created_at == 3600


def test_a_deleted_file_is_gone(client):
    made = upload(client, lines(1))
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


# --- batches -------------------------------------------------------------------------------------


def ended(client, batch_id: str):
    def look():
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "cancelled", "expired") else None

    return until(look, f"the end of {batch_id}")


@pytest.mark.parametrize("window", ["24h", "1h", "4h", "7d"])
def test_a_batch_runs_to_its_output(client, window):
    file = upload(client, lines(3))
    made = client.batches.create(
        input_file_id=file.id, endpoint=URL, completion_window=window, metadata={"k": "v"}
    )
    assert made.status == "validating" and made.metadata == {"k": "v"}
    batch = ended(client, made.id)
    assert batch.status == "completed" and batch.request_counts.completed == 3
    assert batch.usage.output_tokens > 0 and batch.completed_at >= batch.in_progress_at
    rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
    assert {row["custom_id"] for row in rows} == {"c0", "c1", "c2"}
    alone = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=4, temperature=0.0)
    for row in rows:
        assert row["response"]["status_code"] == 200 and row["error"] is None
        body = row["response"]["body"]
        assert body["choices"][0]["message"]["content"] == alone.choices[0].message.content


def test_lines_that_fail_go_to_the_error_file(client):
    file = upload(client, lines(1) + lines(2, max_tokens=1 << 20).replace(b'"c0"', b'"x0"'))
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    batch = ended(client, made.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    rows = client.files.content(batch.error_file_id).text.splitlines()
    assert all(json.loads(row)["error"]["code"] for row in rows)


def test_a_file_with_mistakes_fails_with_their_lines(client):
    file = upload(client, lines(1) + b"nonsense\n")
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    batch = ended(client, made.id)
    assert batch.status == "failed" and batch.errors.data[0].line == 2


def test_a_batch_is_cancelled(client):
    file = upload(client, lines(400, max_tokens=64))
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    until(lambda: client.batches.retrieve(made.id).status == "in_progress", "a start")
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = ended(client, made.id)
    counts = batch.request_counts
    assert batch.status == "cancelled" and counts.completed + counts.failed == 400
    assert made.id in [row.id for row in client.batches.list(limit=100)]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "invalid_value"),
        ({"n": 0}, openai.BadRequestError, "invalid_value"),
        ({"max_tokens": 1 << 20}, openai.BadRequestError, "context_length_exceeded"),
        ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "unknown_parameter"),
        ({"prediction": PREDICTION}, openai.BadRequestError, "unsupported_parameter"),
        ({"tools": [BAD_TOOL]}, openai.BadRequestError, "invalid_value"),
        ({"response_format": BAD_FORMAT}, openai.BadRequestError, "invalid_schema"),
        ({"extra_headers": {"x-deadline-ms": "0"}}, openai.BadRequestError, "invalid_deadline"),
        ({"extra_headers": {"x-slo-class": "gold"}}, openai.BadRequestError, "invalid_slo_class"),
    ],
)  # fmt: skip
def test_errors_are_the_clients_own(client, changes, error, code):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": SAY, **changes})
    assert raised.value.code == code and raised.value.request_id


def test_a_bad_key_is_an_authentication_error(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_embeddings_have_no_model(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.embeddings.create(model=MODEL, input="x")
    assert raised.value.code == "model_not_found"


def test_a_deadline_that_passes_is_an_error(client):
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(
            model=MODEL,
            messages=SAY,
            max_tokens=2000,
            extra_body={"ignore_eos": True},
            extra_headers={"x-deadline-ms": "300"},
        )
    assert raised.value.status_code == 504 and raised.value.code == "deadline_exceeded"


# --- limits and idempotency ----------------------------------------------------------------------


def test_a_key_made_by_the_command_works_and_ends(server):
    made = json.loads(server.manage("apikey", "create", "demo", "--json").stdout)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=made["key"], max_retries=0) as fresh:
        until(lambda: _answers(fresh), "the new key")
        server.manage("apikey", "revoke", made["public_id"])
        until(lambda: not _answers(fresh), "its end")


def _answers(client) -> bool:
    try:
        client.models.list()
    except openai.AuthenticationError:
        return False
    return True


def test_a_running_stream_ends_with_its_key(server):
    made = json.loads(server.manage("apikey", "create", "demo", "--json").stdout)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=made["key"], max_retries=0) as fresh:
        until(lambda: _answers(fresh), "the new key")
        with fresh.chat.completions.create(
            model=MODEL, messages=SAY, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            chunks = iter(stream)
            next(chunks)
            server.manage("apikey", "revoke", made["public_id"])
            with pytest.raises(openai.APIError) as raised:
                for _ in chunks:
                    pass
    assert raised.value.code == "invalid_api_key"


def test_the_same_idempotency_key_is_answered_alike(client):
    headers = {"Idempotency-Key": f"k-{time.time_ns()}"}
    asked = {"model": MODEL, "messages": SAY, "max_tokens": 8, "extra_headers": headers}
    first = client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked).id == first.id
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(**{**asked, "max_tokens": 9})


def test_every_answer_names_its_request(client):
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=SAY, max_tokens=2
    )
    assert answer.headers["x-request-id"] in answer.parse().id
    assert answer.headers["x-slackwater-worker"] and answer.headers["openai-version"]
