"""Bodies of `/v1/chat/completions` and `/v1/completions` to what the gateway runs, or a refusal.

Pure: the same body, snapshot and tokenizers give the same answer, so that the batch lane reads its
lines with the functions that HTTP uses. Every field is known by name (console/parameters.py); an
unknown one is a 400 that names it.
"""

from collections.abc import Mapping
from typing import Any

from console import grammars, parameters
from console.apierrors import ApiError, invalid, model_not_found
from console.facts import Endpoint
from console.fields import Fields, Refused, refuse
from console.generation import GenerateSpec, Shape
from console.messages import message_bytes, read_messages
from console.options import TOP_LOGPROBS_MAX, Options, ParsedRequest, refuse_length
from console.snapshot import ModelFacts, Snapshot, TenantFacts
from console.tokens import ModelTokenizer, TemplateRefused, Tokenizers
from console.tools import ToolPlan, read_tools

MODEL_CHARS_MAX = 128
CHAT_TOKENS_DEFAULT = 1_024  # output limit of a chat that names none
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's
COMPLETION_LOGPROBS_MAX = 5  # OpenAI's


def parse_chat(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/chat/completions, as `caps.load_json` gave it."""
    try:
        fields = Fields(body, parameters.CHAT)
        model, tokenizer = take_model(fields, snapshot, tokenizers)
        messages = read_messages(fields.take("messages"))
        grammar = grammars.of_response_format(fields.take("response_format"))
        tools = read_tools(
            fields.take("tools"), fields.take("tool_choice"), fields.take("parallel_tool_calls")
        )
        logprobs = _chat_logprobs(fields)
        options = Options(fields, snapshot, tenant, ("max_tokens", "max_completion_tokens"))
        fields.end()
        return finish_chat(options, model, tokenizer, messages, tools, grammar, logprobs=logprobs)
    except TemplateRefused as error:
        return invalid(str(error), "messages")
    except Refused as refused:
        return refused.error


def finish_chat(
    options: Options,
    model: ModelFacts,
    tokenizer: ModelTokenizer,
    messages: list[dict[str, Any]],
    tools: ToolPlan,
    grammar: str,
    *,
    logprobs: int | None = None,
    prompt_name: str = "messages",
) -> ParsedRequest:
    """A conversation to ids, with what ties its answer. Raises Refused and TemplateRefused."""
    if tools.tools and not tokenizer.has_tools:
        refuse("This model's chat template knows no tools.", "tools")
    if tools.forced:
        if grammar:
            refuse("response_format contradicts a tool_choice that demands a call.", "tool_choice")
        grammar = grammars.of_tool_calls(tools.forced)
    _check_size(sum(map(message_bytes, messages)), model, tokenizer, prompt_name)
    shown = [tool.for_template() for tool in tools.tools]
    prompt_ids = tokenizer.encode_chat(messages, shown)
    return options.finish(
        model,
        tokenizer,
        prompt_ids,
        CHAT_TOKENS_DEFAULT,
        prompt_name,
        logprobs=logprobs,
        grammar=grammar,
        tools=tools,
    )


def parse_completion(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/completions, as `caps.load_json` gave it."""
    try:
        fields = Fields(body, parameters.COMPLETIONS)
        model, tokenizer = take_model(fields, snapshot, tokenizers)
        prompt = fields.take("prompt")
        logprobs = fields.integer("logprobs", 0, COMPLETION_LOGPROBS_MAX)
        is_echo = fields.flag("echo")
        if is_echo and logprobs is not None:
            refuse("echo with logprobs is not supported: prompts are not scored.", "echo")
        options = Options(fields, snapshot, tenant, ("max_tokens",))
        fields.end()
        prompt_ids = _prompt_ids(prompt, model, tokenizer)
        return options.finish(
            model,
            tokenizer,
            prompt_ids,
            COMPLETION_TOKENS_DEFAULT,
            "prompt",
            logprobs=logprobs,
            echo=_text_of(prompt_ids, tokenizer) if is_echo else "",
        )
    except Refused as refused:
        return refused.error


def spec_of(
    parsed: ParsedRequest,
    tenant: TenantFacts,
    key_id: str,
    endpoint: Endpoint,
    *,
    request_id: str = "",
    arrived_at_s: float | None = None,
) -> GenerateSpec:
    """What the gateway runs for an HTTP request."""
    return GenerateSpec(
        tenant=tenant,
        key_id=key_id,
        model_id=parsed.model.model_id,
        tokenizer=parsed.tokenizer,
        slo=parsed.slo,
        service_tier=parsed.service_tier,
        endpoint=endpoint,
        prompt_ids=parsed.prompt_ids,
        sampling=parsed.sampling,
        is_seeded=parsed.is_seeded,
        stop=parsed.stop,
        stream=parsed.stream,
        shape=Shape(
            parsed.echo,
            parsed.tools,
            None if parsed.sampling.logprobs is None else parsed.tokenizer.pieces,
        ),
        request_id=request_id,
        arrived_at_s=arrived_at_s,
    )


def take_model(
    fields: Fields, snapshot: Snapshot, tokenizers: Tokenizers
) -> tuple[ModelFacts, ModelTokenizer]:
    """The model that a body names. Raises Refused."""
    model_id = fields.take("model")
    if type(model_id) is not str or not model_id:
        refuse("model must name a model.", "model")
    model = snapshot.models.get(model_id) if len(model_id) <= MODEL_CHARS_MAX else None
    if model is None or not model.is_active:
        raise Refused(model_not_found(model_id))
    return model, tokenizers.get(model.model_id, model.folder)


def _chat_logprobs(fields: Fields) -> int | None:
    """`logprobs` says whether, `top_logprobs` how many others beside each id."""
    is_asked = fields.flag("logprobs")
    num_top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)
    if num_top is not None and not is_asked and num_top > 0:
        refuse("top_logprobs needs logprobs true.", "top_logprobs")
    return (num_top or 0) if is_asked else None


def _text_of(prompt_ids: list[int], tokenizer: ModelTokenizer) -> str:
    pieces = tokenizer.pieces
    return b"".join(pieces[token_id] for token_id in prompt_ids).decode(errors="replace")


def _prompt_ids(prompt: Any, model: ModelFacts, tokenizer: ModelTokenizer) -> list[int]:
    """One prompt: text, or token ids; a list holds at most one of either."""
    if type(prompt) is list and len(prompt) == 1 and type(prompt[0]) in (str, list):
        prompt = prompt[0]
    if type(prompt) is str:
        _check_size(len(prompt.encode()), model, tokenizer, "prompt")
        return tokenizer.encode(prompt)
    if type(prompt) is list and prompt and all(type(token_id) is int for token_id in prompt):
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            refuse(f"Token ids must be from 0 to {tokenizer.vocab_size - 1}.", "prompt")
        return list(prompt)
    refuse("prompt must be one text or one list of token ids.", "prompt")


def _check_size(num_bytes: int, model: ModelFacts, tokenizer: ModelTokenizer, param: str) -> None:
    """Refuse before tokenising what is certain to be too long."""
    tokens_min = num_bytes // tokenizer.token_bytes_max
    if tokens_min >= model.max_model_len:
        refuse_length(model, f"the prompt has at least {tokens_min} tokens", param)
