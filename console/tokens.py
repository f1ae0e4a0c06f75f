"""Text to token ids and back: chat templates, special tokens, incremental decoding.

A model with a folder uses its tokenizer.json and chat template; a model without one (the fake
engine's) gets a built-in byte-level vocabulary. Ids equal those of transformers'
`apply_chat_template`, with one intended difference: special-token text that a client writes into
a message stays text.
"""

import codecs
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from console.grammars import GrammarChecker
from controlplane.errors import ConfigError

MODELS_MAX = 32  # tokenizers kept in memory
TEMPLATE_CHARS_MAX = 65_536
RANGE_MAX = 4_096  # items of `range` in a template; one message needs none
RENDER_CHARS_FREE = 65_536  # what a template may add to its input
RENDER_FACTOR_MAX = 4
_BREAK = "\x00"  # parts special-token text in messages; caps.py refuses NUL from clients
_ESCAPED_BREAK = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_BYTE_TURN_START, _BYTE_TURN_END = 256, 257
# What an expression of a template can raise, on messages that its author did not think of.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateRefused(ValueError):
    """A chat template said no to these messages, or broke a limit; the message says which."""


class ModelTokenizer(Protocol):
    """What the gateway needs of a vocabulary."""

    @property
    def pieces(self) -> Sequence[bytes]:
        """Bytes of each id; empty for special tokens."""

    token_bytes_max: int  # longest piece: a prompt has at least bytes / token_bytes_max tokens
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt; special-token text is recognised, as the prompt is all of it."""

    has_tools: bool  # the chat template can show tools to the model
    has_grammars: bool  # its workers can tie an output to a grammar

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins."""


class BytePieces(Sequence[bytes]):
    """Bytes of any id of the built-in vocabulary: 0-255 are bytes, 256 and 257 mark turns, others
    (modelled engines draw from a large vocabulary) read as words."""

    def __getitem__(self, token_id: Any) -> Any:
        if token_id < _BYTE_TURN_START:
            return bytes((token_id,))
        return b"" if token_id <= _BYTE_TURN_END else b" t%d" % token_id

    def __len__(self) -> int:
        return 1 << 32


class ByteTokenizer:
    """The built-in vocabulary: UTF-8 bytes, for models that have no tokenizer of their own."""

    pieces = BytePieces()
    token_bytes_max = 1
    vocab_size = 258
    has_tools = has_grammars = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            turn = f"{message['role']}\n{message['content']}".encode()
            ids += [_BYTE_TURN_START, *turn, _BYTE_TURN_END]
        return [*ids, _BYTE_TURN_START, *b"assistant\n"]


class FolderTokenizer:
    """tokenizer.json with byte-level BPE, and the chat template, of a model folder."""

    has_grammars = True

    def __init__(self, folder: Path) -> None:
        try:
            definition = (folder / "tokenizer.json").read_text()
            json.loads(definition)  # says where it is broken; the library raises bare Exception
            config = json.loads((folder / "tokenizer_config.json").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"model folder {folder}: {error}") from error
        self._tokenizer = Tokenizer.from_str(definition)
        template = config.get("chat_template") or ""
        if not isinstance(template, str) or len(template) > TEMPLATE_CHARS_MAX:
            raise ConfigError(f"model folder {folder}: chat_template is no text of ours")
        environment = _environment()
        self._template = environment.from_string(template) if template else None
        names = meta.find_undeclared_variables(environment.parse(template))
        self.has_tools = "tools" in names
        self._words = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value
        }
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        if any(len(text) < 2 for text in special):
            raise ConfigError(f"model folder {folder}: a special token of a single character")
        self._special_ids = special
        alternatives = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))
        self._special = re.compile(f"({alternatives})") if special else None
        self._plain = Tokenizer.from_str(definition)
        self._plain.encode_special_tokens = True  # special-token text is text to this one
        self.pieces = _byte_pieces(self._tokenizer, set(special.values()), folder)
        self.token_bytes_max = max(map(len, self.pieces))
        self.vocab_size = len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        if self._template is None:
            raise TemplateRefused("This model has no chat template; use /v1/completions.")
        guarded = self._guard_all([list(messages), list(tools)])
        size = len(json.dumps(guarded, ensure_ascii=False))
        chars_max = RENDER_CHARS_FREE + RENDER_FACTOR_MAX * size
        rendered = self._render(self._template, *guarded, chars_max)
        parts = self._special.split(rendered) if self._special else [rendered]
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._plain.encode(part.replace(_BREAK, ""), add_special_tokens=False).ids
        return ids

    def _guard_all(self, value: Any) -> Any:
        """`_guard` of every text in messages and tools; names of fields are ours or schema words,
        which are guarded as well."""
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, list):
            return [self._guard_all(item) for item in value]
        if isinstance(value, Mapping):
            return {self._guard(key): self._guard_all(item) for key, item in value.items()}
        return value

    def _guard(self, content: str) -> str:
        """Break up special-token text, all over so that no overlapping one survives; the breaks
        are taken out again once the rendered text is split at the template's own special tokens."""
        content = content.replace(_BREAK, "")
        if self._special is None:
            return content
        return self._special.sub(lambda m: "".join(c + _BREAK for c in m[0]), content)

    def _render(
        self, template: jinja2.Template, messages: list[Any], tools: list[Any], chars_max: int
    ) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(
                messages=messages, tools=tools or None, add_generation_prompt=True, **self._words
            ):
                pieces.append(piece)
                size += len(piece)
                if size > chars_max:
                    raise TemplateRefused("The chat template made too much of these messages.")
        except TemplateRefused:
            raise
        except _TEMPLATE_FAULTS as error:
            raise TemplateRefused(f"The chat template refused the messages: {error}") from None
        return "".join(pieces)


class Tokenizers:
    """The tokenizers of the served models, loaded when first asked for; any thread may ask.

    Loading takes up to a second, so the event loop asks only for what `has` says is there."""

    def __init__(self) -> None:
        self.grammars = GrammarChecker()
        self._loaded: dict[tuple[str, str], ModelTokenizer] = {}
        self._loading = threading.Lock()

    def has(self, model_id: str, folder: str = "") -> bool:
        """Whether `get` returns at once."""
        return not folder or (model_id, folder) in self._loaded

    def get(self, model_id: str, folder: str = "") -> ModelTokenizer:
        """Raises ConfigError when the folder has no usable tokenizer. Keeps MODELS_MAX of them."""
        key = (model_id, folder)
        known = self._loaded.get(key)
        return self._load(key) if known is None else known

    def _load(self, key: tuple[str, str]) -> ModelTokenizer:
        _, folder = key
        with self._loading:
            if key in self._loaded:
                return self._loaded[key]
            if len(self._loaded) >= MODELS_MAX:
                del self._loaded[next(iter(self._loaded))]
            tokenizer: ModelTokenizer = ByteTokenizer()
            if folder:
                tokenizer = FolderTokenizer(Path(folder))
            self._loaded[key] = tokenizer
        return self._loaded[key]


class IncrementalDecoder:
    """Ids of one output to text, id by id; never half a UTF-8 character.

    The text of all pushes and the flush equals the decoding of all ids at once, without special
    tokens; malformed bytes become U+FFFD."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        """What an unfinished character leaves at the end of the output."""
        return self._utf8.decode(b"", final=True)


def _byte_pieces(tokenizer: Tokenizer, special_ids: set[int], folder: Path) -> list[bytes]:
    """Bytes of each id, through GPT-2's table of printable stand-ins for bytes."""
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        raise ConfigError(f"model folder {folder}: only byte-level tokenizers are supported")
    byte_of = {stand_in: byte for byte, stand_in in _stand_ins()}
    added = {token_id: t.content for token_id, t in tokenizer.get_added_tokens_decoder().items()}
    pieces = []
    for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        piece = tokenizer.id_to_token(token_id)
        if token_id in special_ids or piece is None:
            pieces.append(b"")
        elif token_id in added:
            pieces.append(piece.encode())
        else:
            pieces.append(bytes(byte_of[char] for char in piece))
    return pieces


def _stand_ins() -> Iterator[tuple[int, str]]:
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, others for U+0100 onwards."""
    shifted = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield byte, chr(byte)
        else:
            yield byte, chr(shifted)
            shifted += 1


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without the operators that make a lot out of little.

    Templates come from model folders that an operator installed, never from a client; the sandbox
    bounds what a bad one can do with a client's messages."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and type(left) is int and type(right) is int:
            return left * right
        raise TemplateRefused(f"A chat template must not use {operator} here.")


def _environment() -> ImmutableSandboxedEnvironment:
    """The names and whitespace rules that transformers gives chat templates, in the sandbox."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["range"] = _short_range
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _short_range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > RANGE_MAX:
        raise TemplateRefused(f"range of {len(numbers)} items in a chat template")
    return numbers


def _raise_exception(message: str) -> str:
    raise TemplateRefused(f"The chat template refused the messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON text; the breaks of `_guard` stay breaks instead of becoming escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    return _ESCAPED_BREAK.sub(lambda match: match[1] + _BREAK, text)
