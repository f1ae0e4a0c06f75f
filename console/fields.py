"""Reading one JSON object field by field: each is taken once, what nobody took is unknown.

Checks refuse by raising `Refused`, which `console.requests` turns into the value it carries.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from console.apierrors import ApiError, invalid
from console.caps import quote
from console.parameters import Parameter

PARAM_CHARS_MAX = 128  # of a field's name in `param`
METADATA_PAIRS_MAX, METADATA_KEY_CHARS_MAX, METADATA_VALUE_CHARS_MAX = 16, 64, 512


class Refused(Exception):
    """Carries a refusal out of nested checks; never leaves `console.requests`."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    raise Refused(invalid(message, param, code))


class Fields:
    """The fields of one body; each is taken once, and what nobody took is unknown."""

    def __init__(
        self, body: Mapping[str, Any], table: Mapping[str, Parameter], where: str = ""
    ) -> None:
        """`where` names an object inside of the body. Raises Refused for a field that the table
        does not name."""
        for name in body:
            if name not in table:
                place = f"{where}." if where else ""
                param = where or name[:PARAM_CHARS_MAX]
                refuse(f"Unknown field: {place}{quote(name)}.", param, "unknown_parameter")
        self._left = dict(body)
        self._table = table

    def take(self, name: str) -> Any:
        """The value, or None when it is absent: null and absent mean the same everywhere."""
        return self._left.pop(name, None)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            refuse(f"{name} must be an integer from {low} to {high}.", name)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            refuse(f"{name} must be a number from {low:g} to {high:g}.", name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value not in (None, False, True) or type(value) not in (bool, type(None)):
            refuse(f"{name} must be true or false.", name)
        return bool(value)

    def check_metadata(self, value: Any) -> None:
        """OpenAI's limits for `metadata`."""
        _check_labels(None, value)

    def end(self) -> None:
        """Drop what has no effect here, refuse what would have one."""
        _check_labels(self.take("user"), self.take("metadata"))
        for name, value in self._left.items():
            parameter = self._table[name]
            assert parameter.kind != "used", f"nobody took {name}"
            is_off = value is None or any(_is_same(value, off) for off in parameter.off)
            if parameter.kind == "refused" and not is_off:
                message = f"{name} is not supported: {parameter.note}."
                refuse(message, name, "unsupported_parameter")


def _is_same(value: Any, off: Any) -> bool:
    """Equality that keeps True apart from 1, and takes 0.0 for 0."""
    return value == off and isinstance(value, bool) == isinstance(off, bool)


def _check_labels(user: Any, metadata: Any) -> None:
    """OpenAI's own limits for the two free labels, which are neither stored nor logged here."""
    if user is not None and (type(user) is not str or len(user) > METADATA_VALUE_CHARS_MAX):
        refuse(f"user must be text of at most {METADATA_VALUE_CHARS_MAX} characters.", "user")
    if metadata is None:
        return
    if type(metadata) is not dict or len(metadata) > METADATA_PAIRS_MAX:
        refuse(f"metadata must be an object of at most {METADATA_PAIRS_MAX} pairs.", "metadata")
    for key, value in metadata.items():
        is_fine = type(value) is str and len(value) <= METADATA_VALUE_CHARS_MAX
        if len(key) > METADATA_KEY_CHARS_MAX or not is_fine:
            refuse("metadata holds texts: keys of 64, values of 512 characters.", "metadata")
