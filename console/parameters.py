"""What `/v1` does with each parameter of OpenAI's client and of vLLM's extras, by endpoint.

`used` ones are read by the endpoint's parser; `ignored` ones change nothing here and are dropped;
`refused` ones would change the answer, so that only null and the value that means "off" pass.
docs/api.md is made of these tables' words; a test walks the signatures of the openai client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Parameter:
    kind: Literal["used", "ignored", "refused"]
    note: str = ""  # why it is ignored or refused
    off: tuple[Any, ...] = ()  # values of a refused one that ask for nothing


def _used(*names: str) -> dict[str, Parameter]:
    return {name: Parameter("used") for name in names}


_LABELS = {
    "safety_identifier": Parameter("ignored", "nobody is looked up by it"),
    "store": Parameter("ignored", "no prompt or answer is stored unless the tenant opts in"),
    "prompt_cache_key": Parameter("ignored", "prefixes are found by their content"),
    "prompt_cache_options": Parameter("ignored", "prefixes are found by their content"),
    "prompt_cache_retention": Parameter("ignored", "prefixes stay while memory lasts"),
}
_SAMPLING = _used(
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options",
    "n", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "service_tier",
    "user", "metadata",
    # vLLM's extras
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids",
)  # fmt: skip

# Objects inside of bodies.
STREAM_OPTIONS: Mapping[str, Parameter] = _used("include_usage", "include_obfuscation")
NAMED_SCHEMA: Mapping[str, Parameter] = _used("name", "schema", "strict", "description")
FUNCTION: Mapping[str, Parameter] = _used("name", "description", "parameters", "strict")

BATCHES: Mapping[str, Parameter] = _used(
    "input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"
)

CHAT: Mapping[str, Parameter] = (
    _SAMPLING
    | _LABELS
    | _used(
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    )
    | {
        "audio": Parameter("refused", "models here answer in text"),
        "function_call": Parameter("refused", "deprecated; use tool_choice", ("none", "auto")),
        "functions": Parameter("refused", "deprecated; use tools", ([],)),
        "modalities": Parameter("refused", "models here answer in text", (["text"],)),
        "moderation": Parameter("refused", "no moderation model runs here"),
        "prediction": Parameter("refused", "no speculative decoding runs here"),
        "reasoning_effort": Parameter("refused", "no reasoning model runs here", ("none",)),
        "verbosity": Parameter("refused", "no model here has such a setting", ("medium",)),
        "web_search_options": Parameter("refused", "no tool runs on this side"),
    }
)

COMPLETIONS: Mapping[str, Parameter] = (
    _SAMPLING
    | _LABELS
    | _used("prompt", "echo")
    | {
        "best_of": Parameter("refused", "ask for n and choose yourself", (1,)),
        "suffix": Parameter("refused", "models here continue text, they do not fill gaps", ("",)),
    }
)

RESPONSES: Mapping[str, Parameter] = (
    _LABELS
    | _used(
        "model",
        "input",
        "instructions",
        "max_output_tokens",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "text",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "user",
        "metadata",
        "service_tier",
    )  # fmt: skip
    | {
        "access_programs": Parameter("refused", "no hosted program runs here"),
        "background": Parameter("refused", "use the Batch API", (False,)),
        "background_options": Parameter("refused", "use the Batch API"),
        "context_management": Parameter("refused", "responses are stateless here", ([],)),
        "conversation": Parameter("refused", "responses are stateless here"),
        "image": Parameter("refused", "models here answer in text"),
        "include": Parameter("refused", "nothing else is kept to include", ([],)),
        "max_tool_calls": Parameter("refused", "no tool runs on this side"),
        "moderation": Parameter("refused", "no moderation model runs here"),
        "previous_response_id": Parameter("refused", "responses are stateless here"),
        "prompt": Parameter("refused", "no prompt templates are stored here"),
        "reasoning": Parameter("refused", "no reasoning model runs here", ({},)),
        "top_logprobs": Parameter("refused", "use /v1/chat/completions", (0,)),
        "truncation": Parameter("refused", "a prompt that is too long is refused", ("disabled",)),
    }
)
