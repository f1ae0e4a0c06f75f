"""Bodies of `/v1/chat/completions` and `/v1/completions` to what the gateway runs, or a refusal.

Pure: the same body, snapshot and tokenizers give the same answer, so that the batch lane reads its
lines with the functions that HTTP uses. Every field is known by name; an unknown one is a 400
that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from console.apierrors import ApiError, invalid, model_not_found
from console.caps import quote
from console.facts import Endpoint
from console.gateway import GenerateSpec
from console.snapshot import ModelFacts, Snapshot, TenantFacts
from console.tokens import ModelTokenizer, TemplateRefused, Tokenizers
from controlplane.domain import SLOClass
from controlplane.protocol import RESEND_TOKENS_MAX, Sampling

MESSAGES_MAX = 1_024
PARTS_MAX = 1_024
STOPS_MAX = 4
STOP_BYTES_MAX = 64
STOP_IDS_MAX = 64
NAME_CHARS_MAX = 64
MODEL_CHARS_MAX = 128
METADATA_PAIRS_MAX, METADATA_KEY_CHARS_MAX, METADATA_VALUE_CHARS_MAX = 16, 64, 512
CHAT_TOKENS_DEFAULT = 1_024  # output limit of a chat that names none
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's
TOP_K_MAX = 1 << 31

# Accepted for OpenAI clients, type-checked where OpenAI does, and without effect here.
_IGNORED = (
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "store",
)
# Features that are not served: only the value that means "off" passes, as null does.
_OFF: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
_MESSAGE_OFF = ("annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TIERS = {"priority": "priority", "fast": "priority", "default": "default", "flex": "flex"}
_TENANT_TIERS = ("auto", "scale")  # the tenant's own class serves these


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A checked request: ids and limits. `is_seeded` False leaves the seed to the gateway."""

    model: ModelFacts
    tokenizer: ModelTokenizer
    prompt_ids: list[int]
    sampling: Sampling
    is_seeded: bool
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    slo: SLOClass
    service_tier: str


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
        request_id=request_id,
        arrived_at_s=arrived_at_s,
    )


class _Refused(Exception):
    """Carries a refusal out of nested checks; never leaves this module."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def parse_chat(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/chat/completions, as `caps.load_json` gave it."""
    try:
        fields = _Fields(body)
        model, tokenizer = _model(fields, snapshot, tokenizers)
        messages = _messages(fields.take("messages"))
        response_format = fields.take("response_format")
        if response_format not in (None, {"type": "text"}):
            _refuse("Only the response_format of type text is supported.", "response_format")
        options = _Options(fields, snapshot, tenant, ("max_tokens", "max_completion_tokens"))
        fields.end()
        _check_size(sum(len(m["content"].encode()) for m in messages), model, tokenizer, "messages")
        prompt_ids = tokenizer.encode_chat(messages)
        return options.finish(model, tokenizer, prompt_ids, CHAT_TOKENS_DEFAULT, "messages")
    except TemplateRefused as error:
        return invalid(str(error), "messages")
    except _Refused as refused:
        return refused.error


def parse_completion(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/completions, as `caps.load_json` gave it."""
    try:
        fields = _Fields(body)
        model, tokenizer = _model(fields, snapshot, tokenizers)
        prompt = fields.take("prompt")
        options = _Options(fields, snapshot, tenant, ("max_tokens",))
        fields.end()
        prompt_ids = _prompt_ids(prompt, model, tokenizer)
        return options.finish(model, tokenizer, prompt_ids, COMPLETION_TOKENS_DEFAULT, "prompt")
    except _Refused as refused:
        return refused.error


class _Fields:
    """The fields of one body; each is taken once, and what nobody took is unknown."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = dict(body)

    def take(self, name: str) -> Any:
        """The value, or None when it is absent: null and absent mean the same everywhere."""
        return self._left.pop(name, None)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            _refuse(f"{name} must be an integer from {low} to {high}.", name)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            _refuse(f"{name} must be a number from {low:g} to {high:g}.", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value not in (None, False, True) or type(value) not in (bool, type(None)):
            _refuse(f"{name} must be true or false.", name)
        return bool(value)

    def end(self) -> None:
        """Drop what has no effect here, refuse what would have one, name what is unknown."""
        _check_labels(self.take("user"), self.take("metadata"))
        for name in _IGNORED:
            self.take(name)
        for name, off_values in _OFF.items():
            value = self.take(name)
            if value is not None and not any(_is_same(value, off) for off in off_values):
                _refuse(f"{name} is not supported.", name, "unsupported_parameter")
        for name in self._left:
            _refuse(f"Unknown field: {quote(name)}.", name[:MODEL_CHARS_MAX], "unknown_parameter")


class _Options:
    """The fields that both endpoints share."""

    def __init__(
        self,
        fields: _Fields,
        snapshot: Snapshot,
        tenant: TenantFacts,
        limit_names: tuple[str, ...],
    ) -> None:
        limits = {name: fields.integer(name, 1, 1 << 31) for name in limit_names}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(set(given.values())) > 1:
            _refuse("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
        self.limit_name, self.limit = next(iter(given.items()), (limit_names[0], None))
        temperature = fields.number("temperature", 0.0, 2.0)
        self.temperature = 1.0 if temperature is None else float(temperature)
        top_p = fields.number("top_p", 0.0, 1.0)
        if top_p == 0:
            _refuse("top_p must be above 0.", "top_p")
        self.top_p = 1.0 if top_p is None else float(top_p)
        self.top_k = max(fields.integer("top_k", -1, TOP_K_MAX) or 0, 0)  # -1 is vLLM's "off"
        self.seed = fields.integer("seed", -(1 << 53), 1 << 53)
        self.ignore_eos = fields.flag("ignore_eos")
        self.tokens_min = fields.integer("min_tokens", 0, 1 << 31) or 0
        self.stop = _stops(fields.take("stop"))
        self.stop_ids = fields.take("stop_token_ids")
        self.stream = fields.flag("stream")
        self.include_usage = _include_usage(fields.take("stream_options"), self.stream)
        self.slo, self.service_tier = _class(fields.take("service_tier"), snapshot, tenant)

    def finish(
        self,
        model: ModelFacts,
        tokenizer: ModelTokenizer,
        prompt_ids: list[int],
        tokens_default: int,
        prompt_name: str,
    ) -> ParsedRequest:
        """Limits that need the number of prompt tokens."""
        room = model.max_model_len - len(prompt_ids)
        if not prompt_ids:
            _refuse("The prompt is empty.", prompt_name)
        if room < 1:
            _refuse_length(model, f"the prompt has {len(prompt_ids)} tokens", prompt_name)
        if self.limit is not None and self.limit > room:
            asked = f"{len(prompt_ids)} of the prompt and {self.limit} of the output were asked for"
            _refuse_length(model, asked, self.limit_name)
        limit = min(self.limit or tokens_default, room, RESEND_TOKENS_MAX)
        if self.tokens_min > limit:
            _refuse(f"min_tokens must not be above the output limit {limit}.", "min_tokens")
        sampling = Sampling(
            output_tokens_max=limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=(self.seed or 0) % (1 << 63),
            stop_token_ids=_stop_ids(self.stop_ids, tokenizer),
            output_tokens_min=self.tokens_min,
            ignore_eos=self.ignore_eos,
        )
        return ParsedRequest(
            model=model,
            tokenizer=tokenizer,
            prompt_ids=prompt_ids,
            sampling=sampling,
            is_seeded=self.seed is not None,
            stop=self.stop,
            stream=self.stream,
            include_usage=self.include_usage,
            slo=self.slo,
            service_tier=self.service_tier,
        )


def _refuse(message: str, param: str, code: str = "invalid_value") -> None:
    raise _Refused(invalid(message, param, code))


def _refuse_length(model: ModelFacts, what: str, param: str) -> None:
    message = f"This model's context is {model.max_model_len} tokens, but {what}."
    _refuse(message, param, "context_length_exceeded")


def _is_same(value: Any, off: Any) -> bool:
    """Equality that keeps True apart from 1, and takes 0.0 for 0."""
    return value == off and isinstance(value, bool) == isinstance(off, bool)


def _model(
    fields: _Fields, snapshot: Snapshot, tokenizers: Tokenizers
) -> tuple[ModelFacts, ModelTokenizer]:
    model_id = fields.take("model")
    if type(model_id) is not str or not model_id:
        _refuse("model must name a model.", "model")
    model = snapshot.models.get(model_id) if len(model_id) <= MODEL_CHARS_MAX else None
    if model is None or not model.is_active:
        raise _Refused(model_not_found(model_id))
    return model, tokenizers.get(model.model_id, model.folder)


def _messages(value: Any) -> list[dict[str, str]]:
    if type(value) is not list or not 1 <= len(value) <= MESSAGES_MAX:
        _refuse(f"messages must be a list of 1 to {MESSAGES_MAX} messages.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if type(message) is not dict:
        _refuse(f"{where} must be an object.", where)
    left = dict(message)
    role = left.pop("role", None)
    if type(role) is not str or role not in _ROLES:
        _refuse(f"{where}.role must be one of {', '.join(_ROLES)}.", f"{where}.role")
    content = _content(left.pop("content", None), role, f"{where}.content")
    name = left.pop("name", None)
    if name is not None and (type(name) is not str or len(name) > NAME_CHARS_MAX):
        _refuse(f"{where}.name must be text of at most {NAME_CHARS_MAX} characters.", where)
    for off in _MESSAGE_OFF:
        if left.pop(off, None) not in (None, []):
            _refuse(f"{where}.{off} is not supported.", f"{where}.{off}", "unsupported_parameter")
    for unknown in left:
        param = f"{where}.{unknown[:MODEL_CHARS_MAX]}"
        _refuse(f"Unknown field: {where}.{quote(unknown)}.", param, "unknown_parameter")
    return {"role": _ROLES[role], "content": content}


def _content(content: Any, role: str, where: str) -> str:
    """Text, or text parts joined by line ends as vLLM does; null for an assistant only."""
    if content is None and role == "assistant":
        return ""
    if type(content) is str:
        return content
    if type(content) is not list or not 1 <= len(content) <= PARTS_MAX:
        _refuse(f"{where} must be text or a list of 1 to {PARTS_MAX} text parts.", where)
    for index, part in enumerate(content):
        is_text = type(part) is dict and part.get("type") == "text"
        if not is_text or type(part.get("text")) is not str or len(part) > 2:
            _refuse(f"{where}[{index}] must be a part of type text.", f"{where}[{index}]")
    return "\n".join(part["text"] for part in content)


def _prompt_ids(prompt: Any, model: ModelFacts, tokenizer: ModelTokenizer) -> list[int]:
    """One prompt: text, or token ids; a list holds at most one of either."""
    if type(prompt) is list and len(prompt) == 1 and type(prompt[0]) in (str, list):
        prompt = prompt[0]
    if type(prompt) is str:
        _check_size(len(prompt.encode()), model, tokenizer, "prompt")
        return tokenizer.encode(prompt)
    if type(prompt) is list and prompt and all(type(token_id) is int for token_id in prompt):
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            _refuse(f"Token ids must be from 0 to {tokenizer.vocab_size - 1}.", "prompt")
        return list(prompt)
    _refuse("prompt must be one text or one list of token ids.", "prompt")
    raise AssertionError("unreachable")


def _check_size(num_bytes: int, model: ModelFacts, tokenizer: ModelTokenizer, param: str) -> None:
    """Refuse before tokenising what is certain to be too long."""
    tokens_min = num_bytes // tokenizer.token_bytes_max
    if tokens_min >= model.max_model_len:
        _refuse_length(model, f"the prompt has at least {tokens_min} tokens", param)


def _stops(stop: Any) -> tuple[str, ...]:
    texts = [stop] if type(stop) is str else stop
    if texts is None:
        return ()
    if type(texts) is not list or len(texts) > STOPS_MAX:
        _refuse(f"stop must be text or a list of at most {STOPS_MAX} texts.", "stop")
    for text in texts:
        if type(text) is not str or not 1 <= len(text.encode()) <= STOP_BYTES_MAX:
            _refuse(f"Each stop must be text of 1 to {STOP_BYTES_MAX} bytes.", "stop")
    return tuple(texts)


def _stop_ids(value: Any, tokenizer: ModelTokenizer) -> list[int]:
    ids = [] if value is None else value
    if type(ids) is not list or len(ids) > STOP_IDS_MAX:
        _refuse(f"stop_token_ids must be a list of at most {STOP_IDS_MAX} ids.", "stop_token_ids")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < tokenizer.vocab_size:
            _refuse(f"stop_token_ids must be below {tokenizer.vocab_size}.", "stop_token_ids")
    return ids


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or type(options) is not dict:
        _refuse("stream_options must be an object, and only with stream true.", "stream_options")
    fields = _Fields(options)
    include_usage = fields.flag("include_usage")
    fields.flag("include_obfuscation")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            _refuse(f"Unknown field: stream_options.{quote(name)}.", "stream_options")
    return include_usage


def _class(tier: Any, snapshot: Snapshot, tenant: TenantFacts) -> tuple[SLOClass, str]:
    """The SLO class that serves this request, and the tier that the answer names."""
    if tier is None or tier in _TENANT_TIERS:
        chosen = snapshot.classes[tenant.default_class]
        return chosen.slo, chosen.service_tier
    if type(tier) is str and tier in _TIERS:
        facts = snapshot.class_of_tier(_TIERS[tier])
        if facts is not None and not facts.slo.is_batch:
            return facts.slo, facts.service_tier
    names = ", ".join((*_TENANT_TIERS, *_TIERS))
    _refuse(f"service_tier must be one of {names}.", "service_tier")
    raise AssertionError("unreachable")


def _check_labels(user: Any, metadata: Any) -> None:
    """OpenAI's own limits for the two free labels, which are neither stored nor logged here."""
    if user is not None and (type(user) is not str or len(user) > METADATA_VALUE_CHARS_MAX):
        _refuse(f"user must be text of at most {METADATA_VALUE_CHARS_MAX} characters.", "user")
    if metadata is None:
        return
    if type(metadata) is not dict or len(metadata) > METADATA_PAIRS_MAX:
        _refuse(f"metadata must be an object of at most {METADATA_PAIRS_MAX} pairs.", "metadata")
    for key, value in metadata.items():
        is_fine = type(value) is str and len(value) <= METADATA_VALUE_CHARS_MAX
        if len(key) > METADATA_KEY_CHARS_MAX or not is_fine:
            _refuse("metadata holds texts: keys of 64, values of 512 characters.", "metadata")
