"""The fields that generation endpoints share: limits, sampling, stops, class."""

from dataclasses import dataclass
from typing import Any, NoReturn

from console.caps import quote
from console.fields import Fields, refuse
from console.parameters import STREAM_OPTIONS
from console.snapshot import ModelFacts, Snapshot, TenantFacts
from console.tokens import ModelTokenizer
from console.tools import NO_TOOLS, ToolPlan
from controlplane.domain import SLOClass
from controlplane.protocol import RESEND_TOKENS_MAX, Sampling

STOPS_MAX = 4
STOP_BYTES_MAX = 64
STOP_IDS_MAX = 64
TOP_K_MAX = 1 << 31
CHOICES_MAX = 8  # `n`: outputs of one request
BIASES_MAX = 300  # OpenAI's
TOP_LOGPROBS_MAX = 20

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
    num_choices: int = 1
    echo: str = ""  # text to put before each output
    tools: ToolPlan = NO_TOOLS


class Options:
    """Takes the shared fields out of a body; `finish` checks them against model and prompt."""

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
        self.temperature = _number(fields, "temperature", 0.0, 2.0, 1.0)
        self.top_p = _number(fields, "top_p", 0.0, 1.0, 1.0)
        if self.top_p == 0:
            refuse("top_p must be above 0.", "top_p")
        self.top_k = max(fields.integer("top_k", -1, TOP_K_MAX) or 0, 0)  # -1 is vLLM's "off"
        self.min_p = _number(fields, "min_p", 0.0, 1.0, 0.0)
        self.presence_penalty = _number(fields, "presence_penalty", -2.0, 2.0, 0.0)
        self.frequency_penalty = _number(fields, "frequency_penalty", -2.0, 2.0, 0.0)
        self.repetition_penalty = _number(fields, "repetition_penalty", 0.0, 10.0, 1.0)
        if self.repetition_penalty == 0:
            refuse("repetition_penalty must be above 0.", "repetition_penalty")
        self.biases = fields.take("logit_bias")
        self.seed = fields.integer("seed", -(1 << 53), 1 << 53)
        self.num_choices = fields.integer("n", 1, CHOICES_MAX) or 1
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
        *,
        logprobs: int | None = None,
        grammar: str = "",
        echo: str = "",
        tools: ToolPlan = NO_TOOLS,
    ) -> ParsedRequest:
        """Limits that need the number of prompt tokens, and ids that need the vocabulary."""
        room = model.max_model_len - len(prompt_ids)
        if not prompt_ids:
            refuse("The prompt is empty.", prompt_name)
        if room < 1:
            refuse_length(model, f"the prompt has {len(prompt_ids)} tokens", prompt_name)
        if self.limit is not None and self.limit > room:
            asked = f"{len(prompt_ids)} of the prompt and {self.limit} of the output were asked for"
            refuse_length(model, asked, self.limit_name)
        limit = min(self.limit or tokens_default, room, RESEND_TOKENS_MAX)
        if self.tokens_min > limit:
            refuse(f"min_tokens must not be above the output limit {limit}.", "min_tokens")
        if grammar and not tokenizer.has_grammars:
            refuse("This model cannot be tied to a schema.", "response_format")
        if grammar and (self.ignore_eos or self.tokens_min):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            refuse(f"{name} contradicts an output that ends where its schema ends.", name)
        sampling = Sampling(
            output_tokens_max=limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=(self.seed or 0) % (1 << 63),
            stop_token_ids=_stop_ids(self.stop_ids, tokenizer),
            output_tokens_min=self.tokens_min,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.biases, tokenizer),
            grammar=grammar,
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
            num_choices=self.num_choices,
            echo=echo,
            tools=tools,
        )


def refuse_length(model: ModelFacts, what: str, param: str) -> NoReturn:
    message = f"This model's context is {model.max_model_len} tokens, but {what}."
    refuse(message, param, "context_length_exceeded")


def _number(fields: Fields, name: str, low: float, high: float, default: float) -> float:
    value = fields.number(name, low, high)
    return default if value is None else value


def _biases(value: Any, tokenizer: ModelTokenizer) -> dict[int, float]:
    """`logit_bias`: numbers from -100 to 100 by token id, the ids as text as JSON has them."""
    if value in (None, {}):
        return {}
    if type(value) is not dict or len(value) > BIASES_MAX:
        refuse(f"logit_bias must be an object of at most {BIASES_MAX} ids.", "logit_bias")
    biases = {}
    for text, bias in value.items():
        is_id = text.isascii() and text.isdigit() and int(text[:12]) < tokenizer.vocab_size
        if not is_id or len(text) > 12:
            refuse(f"logit_bias has {quote(text)}, which is no token id.", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            refuse("Biases of logit_bias must be numbers from -100 to 100.", "logit_bias")
        biases[int(text)] = float(bias)
    return biases


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
    fields = Fields(options, STREAM_OPTIONS, "stream_options")
    fields.flag("include_obfuscation")  # nothing is padded here
    return fields.flag("include_usage")


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
