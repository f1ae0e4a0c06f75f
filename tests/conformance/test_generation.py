"""Chat, completions, responses, tools, schemas and logprobs, by OpenAI's own client."""

import json
import math

import pytest

from tests.conformance.conftest import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.serial]
SAY = [{"role": "user", "content": "Name a colour."}]
GREEDY = {"model": MODEL, "temperature": 0.0, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["colour", "warm"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def plain(client):
    return client.chat.completions.create(messages=SAY, **GREEDY)


def chat(client, **changes):
    return client.chat.completions.create(**{"messages": SAY, **GREEDY, **changes})


# --- chat ----------------------------------------------------------------------------------------


def test_a_chat_has_the_shape_of_openais(plain):
    assert plain.object == "chat.completion" and plain.id.startswith("chatcmpl-")
    assert plain.model == MODEL and plain.system_fingerprint and plain.created > 1_700_000_000
    (choice,) = plain.choices
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and choice.message.refusal is None


def test_usage_adds_up(plain):
    usage = plain.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 12


def test_greedy_answers_repeat(client, plain):
    assert chat(client).choices[0].message.content == plain.choices[0].message.content


def test_seeds_repeat_and_differ(client):
    def say(seed):
        made = chat(client, temperature=1.3, seed=seed, max_tokens=24)
        return made.choices[0].message.content

    assert say(7) == say(7)
    assert len({say(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_output_is_cut_at_the_limit(client, name):
    made = chat(client, **{"max_tokens": None, name: 3, "extra_body": {"ignore_eos": True}})
    assert made.usage.completion_tokens == 3 and made.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_itself(client, plain):
    text = plain.choices[0].message.content
    stop = text[4:7]
    made = chat(client, stop=[stop])
    assert made.choices[0].message.content == text[: text.index(stop)]
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_come_in_either_role(client, role):
    messages = [{"role": role, "content": "You are terse."}, *SAY]
    assert chat(client, messages=messages).choices[0].message.content is not None


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour."}]
    made = chat(client, messages=[{"role": "user", "content": parts}])
    joined = chat(client, messages=[{"role": "user", "content": "Name a\ncolour."}])
    assert made.choices[0].message.content == joined.choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "served"),
    [("auto", "priority"), ("default", "default"), ("flex", "flex"), ("priority", "priority")],
)
def test_the_tier_served_is_named(client, asked, served):
    made = chat(client, service_tier=asked, max_tokens=2)
    assert made.service_tier in (served, "default")


def test_n_choices_differ_and_share_the_prompt(client):
    made = chat(client, n=3, temperature=1.5, seed=5, max_tokens=16)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in made.choices}) > 1
    one = chat(client, temperature=1.5, seed=5, max_tokens=16)
    assert made.choices[0].message.content == one.choices[0].message.content
    assert made.usage.prompt_tokens == one.usage.prompt_tokens


def test_a_bias_forces_and_forbids_ids(client, plain):
    ids = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs.content
    made = chat(client, logit_bias={"400": 100}, max_tokens=4, extra_body={"ignore_eos": True})
    piece = made.choices[0].message.content[: len(made.choices[0].message.content) // 4]
    assert made.choices[0].message.content == piece * 4 and ids


@pytest.mark.parametrize(
    "penalty",
    [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 1.5}},
    ],
)
def test_penalties_reduce_repetition(client, penalty):
    def words(**more):
        extra = {"ignore_eos": True} | more.pop("extra_body", {})
        made = chat(client, max_tokens=60, extra_body=extra, **more)
        return made.choices[0].message.content.split()

    without, with_it = words(), words(**penalty)
    assert len(set(with_it)) / len(with_it) >= len(set(without)) / len(without)


# --- streams -------------------------------------------------------------------------------------


def pieces(client, **changes):
    with client.chat.completions.create(
        **{"messages": SAY, **GREEDY, **changes}, stream=True
    ) as stream:
        return list(stream)


def test_a_stream_says_what_the_whole_answer_says(client, plain):
    chunks = pieces(client)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason
    assert {c.id for c in chunks} == {chunks[0].id}


def test_a_stream_gives_usage_when_asked(client, plain):
    chunks = pieces(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_of_several_choices(client):
    chunks = pieces(client, n=2, temperature=1.5, seed=5, max_tokens=16)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    whole = chat(client, n=2, temperature=1.5, seed=5, max_tokens=16)
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


def test_a_stream_can_be_left(client):
    with client.chat.completions.create(
        messages=SAY, model=MODEL, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    assert chat(client, max_tokens=2).choices[0].message.content is not None


# --- completions ---------------------------------------------------------------------------------


def complete(client, **changes):
    base = {"model": MODEL, "prompt": "The tide", "max_tokens": 8, "temperature": 0.0}
    return client.completions.create(**{**base, **changes})


def test_a_completion_goes_on(client):
    made = complete(client)
    assert made.object == "text_completion" and made.choices[0].text


def test_echo_puts_the_prompt_before_it(client):
    made = complete(client, echo=True)
    assert made.choices[0].text == "The tide" + complete(client).choices[0].text


def test_a_prompt_may_be_ids(client):
    assert complete(client, prompt=[504, 8192, 23]).usage.prompt_tokens == 3


def test_completions_stream(client):
    with complete(client, stream=True) as stream:
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == complete(client).choices[0].text


def test_completion_logprobs(client):
    scores = complete(client, logprobs=2).choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 8
    assert all(len(top) == 2 for top in scores.top_logprobs) and scores.text_offset[0] == 0
    assert scores.token_logprobs[0] == max(scores.top_logprobs[0].values())


# --- logprobs ------------------------------------------------------------------------------------


def test_logprobs_of_a_chat(client):
    made = chat(client, logprobs=True, top_logprobs=3)
    entries = made.choices[0].logprobs.content
    assert len(entries) == made.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.token == entry.top_logprobs[0].token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0 + 1e-6
    text = bytes(b for entry in entries for b in entry.bytes or []).decode()
    assert text == made.choices[0].message.content


def test_logprobs_of_a_stream_are_those_of_the_whole(client):
    whole = chat(client, logprobs=True).choices[0].logprobs.content
    chunks = pieces(client, logprobs=True)
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in whole]


# --- schemas and tools ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.2, "seed": 1}, {"temperature": 1.9, "seed": 2}]
)
def test_an_answer_matches_its_schema(client, sampling):
    made = chat(client, response_format=FORMAT, **{"max_tokens": 200, **sampling})
    value = json.loads(made.choices[0].message.content)
    assert set(value) == {"colour", "warm"} and isinstance(value["warm"], bool)
    assert made.choices[0].finish_reason == "stop"


def test_a_json_object_is_an_object(client):
    made = chat(client, response_format={"type": "json_object"}, max_tokens=400, temperature=0.0)
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(made.choices[0].message.content), dict)
    assert made.choices[0].message.content.lstrip().startswith("{")


def test_a_schema_streams(client):
    chunks = pieces(client, response_format=FORMAT, max_tokens=200)
    assert set(json.loads("".join(c.choices[0].delta.content or "" for c in chunks))) == {
        "colour",
        "warm",
    }


def test_a_required_tool_is_called_with_arguments_of_its_schema(client):
    made = chat(client, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=200)
    (choice,) = made.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name in ("weather", "clock")
    assert isinstance(json.loads(call.function.arguments), dict)


def test_a_named_tool_is_called(client):
    named = {"type": "function", "function": {"name": "weather"}}
    made = chat(client, tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=200)
    (call,) = made.choices[0].message.tool_calls
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}


def test_a_tool_call_streams(client):
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = pieces(client, tools=[WEATHER], tool_choice=named, max_tokens=200)
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == "weather"
    assert set(json.loads("".join(c.function.arguments or "" for c in calls))) == {"city"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_tool_results_goes_on(client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
    }
    messages = [
        *SAY,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    made = chat(client, messages=messages, tools=[WEATHER], tool_choice="none")
    assert made.choices[0].message.tool_calls is None


def test_tools_without_a_demand_leave_the_text_alone(client):
    made = chat(client, tools=[WEATHER])
    assert made.choices[0].finish_reason in ("stop", "length", "tool_calls")


# --- responses -----------------------------------------------------------------------------------


def respond(client, **changes):
    base = {"model": MODEL, "input": "Name a colour.", "temperature": 0.0, "max_output_tokens": 12}
    return client.responses.create(**{**base, **changes})


def test_a_response_says_what_a_chat_says(client, plain):
    made = respond(client)
    assert made.object == "response" and made.id.startswith("resp_")
    assert made.output_text == plain.choices[0].message.content
    assert made.usage.output_tokens == plain.usage.completion_tokens


def test_a_cut_response_is_incomplete(client):
    made = respond(client, max_output_tokens=3, input="Tell me a long story about the sea.")
    assert made.status == "incomplete" and made.incomplete_details.reason == "max_output_tokens"


def test_instructions_and_items(client):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]}]
    assert respond(client, instructions="You are terse.", input=items).output_text is not None


def test_a_response_streams_named_events(client):
    with respond(client, stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == respond(client).output_text == events[-1].response.output_text


def test_a_response_matches_its_schema(client):
    form = {"format": {"type": "json_schema", "name": "c", "schema": SCHEMA}}
    made = respond(client, text=form, max_output_tokens=200)
    assert set(json.loads(made.output_text)) == {"colour", "warm"}


def test_a_response_calls_a_tool(client):
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    made = respond(client, tools=[tool], tool_choice="required", max_output_tokens=200)
    (item,) = made.output
    assert item.type == "function_call" and set(json.loads(item.arguments)) == {"city"}
