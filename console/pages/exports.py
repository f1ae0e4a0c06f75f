"""Rows of a table as a file that a spreadsheet or a program reads."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.http import HttpResponse

KINDS = ("csv", "json")


def download(
    rows: Sequence[dict[str, Any]], names: Sequence[str], kind: str, title: str
) -> HttpResponse:
    """The rows with these columns; `kind` is one of KINDS."""
    assert kind in KINDS, kind
    if kind == "json":
        text, content_type = json.dumps(rows, cls=DjangoJSONEncoder), "application/json"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names)
        writer.writeheader()
        writer.writerows({name: guarded(value) for name, value in row.items()} for row in rows)
        text, content_type = buffer.getvalue(), "text/csv; charset=utf-8"
    disposition = f'attachment; filename="{title}.{kind}"'
    return HttpResponse(
        text, content_type=content_type, headers={"content-disposition": disposition}
    )


def guarded(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets a quote in front (OWASP)."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value
