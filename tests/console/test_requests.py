"""Bodies to checked requests: what is accepted, how it is understood, what limits it."""

import pytest

from console.apierrors import ApiError
from console.requests import CHAT_TOKENS_DEFAULT, parse_chat, parse_completion
from console.snapshot import ModelFacts
from console.tokens import Tokenizers
from tests.console.memoryserver import (
    CONTEXT_TOKENS,
    MODEL_ID,
    TENANT,
    chat_body,
    make_snapshot,
)

TOKENIZERS = Tokenizers()


def chat(**changes):
    return parse_chat(chat_body(**changes), make_snapshot(), TOKENIZERS, TENANT)


def completion(**changes):
    body = {"model": MODEL_ID, "prompt": "abc"} | changes
    return parse_completion(body, make_snapshot(), TOKENIZERS, TENANT)


def refused(parsed, param, code=None, status=400):
    assert isinstance(parsed, ApiError), parsed
    assert (parsed.status, parsed.param) == (status, param)
    assert code is None or parsed.code == code
    return parsed


def text_of(parsed):
    return bytes(i for i in parsed.prompt_ids if i < 256).decode()


# --- what is understood --------------------------------------------------------------------------


def test_plain_chat_has_the_defaults():
    parsed = chat()
    sampling = parsed.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.output_tokens_max, sampling.output_tokens_min) == (CONTEXT_TOKENS - 20, 0)
    assert len(parsed.prompt_ids) == 20
    assert not parsed.is_seeded and not parsed.stream and not parsed.include_usage
    assert parsed.stop == () and parsed.slo.name == "standard"


def test_null_means_absent_for_every_field():
    names = [
        "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n",
        "stream", "stream_options", "response_format", "service_tier", "top_k", "ignore_eos",
        "min_tokens", "stop_token_ids", "user", "metadata", "store", "logprobs", "logit_bias",
        "tools", "tool_choice", "presence_penalty", "frequency_penalty", "top_logprobs",
        "reasoning_effort",
    ]  # fmt: skip
    assert chat(**dict.fromkeys(names)) == chat()


def test_harmless_fields_and_off_values_change_nothing():
    off = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": False,
        "safety_identifier": "x", "prompt_cache_key": "k", "n": 1, "logprobs": False,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "presence_penalty": 0,
        "frequency_penalty": 0.0, "top_logprobs": 0, "modalities": ["text"], "min_p": 0,
        "repetition_penalty": 1.0, "response_format": {"type": "text"}, "stop": [],
    }  # fmt: skip
    assert chat(**off) == chat()


def test_sampling_fields_reach_the_engine():
    parsed = chat(
        temperature=0,
        top_p=0.5,
        top_k=7,
        seed=-1,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3, 4],
        stop="x",
    )
    sampling = parsed.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 7)
    assert sampling.seed == (1 << 63) - 1 and parsed.is_seeded
    assert (sampling.output_tokens_max, sampling.output_tokens_min) == (9, 2)
    assert sampling.ignore_eos and sampling.stop_token_ids == [3, 4]
    assert parsed.stop == ("x",)


@pytest.mark.parametrize("value", [0, -1])
def test_top_k_off_as_in_openai_and_vllm(value):
    assert chat(top_k=value).sampling.top_k == 0


def test_max_completion_tokens_is_max_tokens():
    assert chat(max_completion_tokens=5).sampling.output_tokens_max == 5
    assert chat(max_completion_tokens=5, max_tokens=5).sampling.output_tokens_max == 5
    refused(chat(max_completion_tokens=5, max_tokens=6), "max_tokens")
    refused(completion(max_completion_tokens=5), "max_completion_tokens", "unknown_parameter")


def test_a_long_context_does_not_make_an_unnamed_limit_long():
    models = {MODEL_ID: ModelFacts(MODEL_ID, "", 1 << 17, 1.0, True)}
    parsed = parse_chat(chat_body(), make_snapshot(models=models), TOKENIZERS, TENANT)
    assert parsed.sampling.output_tokens_max == CHAT_TOKENS_DEFAULT


def test_developer_is_system_and_parts_are_joined():
    parsed = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "c", "name": "Ann"},
        ]
    )
    assert text_of(parsed) == "system\nbe kinduser\na\nbassistant\nuser\ncassistant\n"


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_prompt_is_text_or_ids_alone_or_in_a_list(prompt):
    assert completion(prompt=prompt).prompt_ids == [97, 98, 99]


# --- limits --------------------------------------------------------------------------------------


def test_prompt_and_output_fill_the_context_and_no_more():
    parsed = completion(prompt=[1] * (CONTEXT_TOKENS - 1), max_tokens=1)
    assert parsed.sampling.output_tokens_max == 1
    refused(
        completion(prompt=[1] * (CONTEXT_TOKENS - 1), max_tokens=2),
        "max_tokens",
        "context_length_exceeded",
    )
    refused(completion(prompt=[1] * CONTEXT_TOKENS), "prompt", "context_length_exceeded")


def test_text_that_must_be_too_long_is_refused_before_it_is_tokenised():
    class Untouchable:
        token_bytes_max = 4
        vocab_size = 10

    class OnlyOne:
        def get(self, model_id, folder):
            return Untouchable()

    body = {"model": MODEL_ID, "prompt": "x" * 4 * CONTEXT_TOKENS}
    parsed = parse_completion(body, make_snapshot(), OnlyOne(), TENANT)
    refused(parsed, "prompt", "context_length_exceeded")


def test_four_stops_of_64_bytes_are_the_most():
    assert len(chat(stop=["é" * 32] * 4).stop) == 4
    refused(chat(stop=["é" * 32 + "a"]), "stop")
    refused(chat(stop=["a"] * 5), "stop")


def test_1024_messages_are_the_most():
    one = {"role": "user", "content": ""}
    assert not isinstance(chat(messages=[one] * 32), ApiError)
    refused(chat(messages=[one] * 1025), "messages")


def test_inactive_model_does_not_exist():
    models = {MODEL_ID: ModelFacts(MODEL_ID, "", 1024, 1.0, False)}
    parsed = parse_chat(chat_body(), make_snapshot(models=models), TOKENIZERS, TENANT)
    refused(parsed, "model", "model_not_found", 404)


def test_unknown_field_is_named():
    for field in ("kv_transfer_params", "request_id", "priority", "cache_salt", "foo\r\nbar"):
        error = refused(chat(**{field: 1}), field, "unknown_parameter")
        assert ascii(field)[1:-1] in error.message and "\n" not in error.message
    error = refused(
        chat(messages=[{"role": "user", "content": "x", "weight": 1}]),
        "messages[0].weight",
        "unknown_parameter",
    )
    assert "weight" in error.message


def test_batch_tier_cannot_be_asked_for():
    refused(chat(service_tier="batch"), "service_tier")
