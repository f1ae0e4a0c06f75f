"""Bodies of `/v1/chat/completions` and `/v1/completions` to what the gateway runs, or a refusal.

Pure: the same body, snapshot and tokenizers give the same answer, so that the batch lane reads its
lines with the functions that HTTP uses. Every field is known by name; an unknown one is a 400
that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from console.apierrors import ApiError, invalid, model_not_found
from console.caps import quote
from console.facts import Endpoint
from console.fields import Fields, Refused, refuse
from console.generation import GenerateSpec
from console.messages import read_messages
from console.snapshot import ModelFacts, Snapshot, TenantFacts
from console.tokens import ModelTokenizer, TemplateRefused, Tokenizers
from controlplane.domain import SLOClass
from controlplane.protocol import RESEND_TOKENS_MAX, Sampling

STOPS_MAX = 4
STOP_BYTES_MAX = 64
STOP_IDS_MAX = 64
MODEL_CHARS_MAX = 128
CHAT_TOKENS_DEFAULT = 1_024  # output limit of a chat that names none
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's
TOP_K_MAX = 1 << 31

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


def parse_chat(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/chat/completions, as `caps.load_json` gave it."""
    try:
        fields = Fields(body)
        model, tokenizer = _model(fields, snapshot, tokenizers)
        messages = read_messages(fields.take("messages"))
        response_format = fields.take("response_format")
        if response_format not in (None, {"type": "text"}):
            refuse("Only the response_format of type text is supported.", "response_format")
        options = _Options(fields, snapshot, tenant, ("max_tokens", "max_completion_tokens"))
        fields.end()
        _check_size(sum(len(m["content"].encode()) for m in messages), model, tokenizer, "messages")
        prompt_ids = tokenizer.encode_chat(messages)
        return options.finish(model, tokenizer, prompt_ids, CHAT_TOKENS_DEFAULT, "messages")
    except TemplateRefused as error:
        return invalid(str(error), "messages")
    except Refused as refused:
        return refused.error


def parse_completion(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/completions, as `caps.load_json` gave it."""
    try:
        fields = Fields(body)
        model, tokenizer = _model(fields, snapshot, tokenizers)
        prompt = fields.take("prompt")
        options = _Options(fields, snapshot, tenant, ("max_tokens",))
        fields.end()
        prompt_ids = _prompt_ids(prompt, model, tokenizer)
        return options.finish(model, tokenizer, prompt_ids, COMPLETION_TOKENS_DEFAULT, "prompt")
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
        request_id=request_id,
        arrived_at_s=arrived_at_s,
    )


class _Options:
    """The fields that both endpoints share."""

    def __init__(
        self,
        fields: Fields,
        snapshot: Snapshot,
        tenant: TenantFacts,
        limit_names: tuple[str, ...],
    ) -> None:
        limits = {name: fields.integer(name, 1, 1 << 31) for name in limit_names}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(set(given.values())) > 1:
            refuse("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
        self.limit_name = next(iter(given), limit_names[0])
        self.limit = given.get(self.limit_name)
        temperature = fields.number("temperature", 0.0, 2.0)
        self.temperature = 1.0 if temperature is None else temperature
        top_p = fields.number("top_p", 0.0, 1.0)
        if top_p == 0:
            refuse("top_p must be above 0.", "top_p")
        self.top_p = 1.0 if top_p is None else top_p
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
            refuse("The prompt is empty.", prompt_name)
        if room < 1:
            _refuse_length(model, f"the prompt has {len(prompt_ids)} tokens", prompt_name)
        if self.limit is not None and self.limit > room:
            asked = f"{len(prompt_ids)} of the prompt and {self.limit} of the output were asked for"
            _refuse_length(model, asked, self.limit_name)
        limit = min(self.limit or tokens_default, room, RESEND_TOKENS_MAX)
        if self.tokens_min > limit:
            refuse(f"min_tokens must not be above the output limit {limit}.", "min_tokens")
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


def _refuse_length(model: ModelFacts, what: str, param: str) -> NoReturn:
    message = f"This model's context is {model.max_model_len} tokens, but {what}."
    refuse(message, param, "context_length_exceeded")


def _model(
    fields: Fields, snapshot: Snapshot, tokenizers: Tokenizers
) -> tuple[ModelFacts, ModelTokenizer]:
    model_id = fields.take("model")
    if type(model_id) is not str or not model_id:
        refuse("model must name a model.", "model")
    model = snapshot.models.get(model_id) if len(model_id) <= MODEL_CHARS_MAX else None
    if model is None or not model.is_active:
        raise Refused(model_not_found(model_id))
    return model, tokenizers.get(model.model_id, model.folder)


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
        _refuse_length(model, f"the prompt has at least {tokens_min} tokens", param)


def _stops(stop: Any) -> tuple[str, ...]:
    texts = [stop] if type(stop) is str else stop
    if texts is None:
        return ()
    if type(texts) is not list or len(texts) > STOPS_MAX:
        refuse(f"stop must be text or a list of at most {STOPS_MAX} texts.", "stop")
    for text in texts:
        if type(text) is not str or not 1 <= len(text.encode()) <= STOP_BYTES_MAX:
            refuse(f"Each stop must be text of 1 to {STOP_BYTES_MAX} bytes.", "stop")
    return tuple(texts)


def _stop_ids(value: Any, tokenizer: ModelTokenizer) -> list[int]:
    ids = [] if value is None else value
    if type(ids) is not list or len(ids) > STOP_IDS_MAX:
        refuse(f"stop_token_ids must be a list of at most {STOP_IDS_MAX} ids.", "stop_token_ids")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < tokenizer.vocab_size:
            refuse(f"stop_token_ids must be below {tokenizer.vocab_size}.", "stop_token_ids")
    return ids


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or type(options) is not dict:
        refuse("stream_options must be an object, and only with stream true.", "stream_options")
    fields = Fields(options)
    include_usage = fields.flag("include_usage")
    fields.flag("include_obfuscation")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            refuse(f"Unknown field: stream_options.{quote(name)}.", "stream_options")
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
    refuse(f"service_tier must be one of {names}.", "service_tier")
