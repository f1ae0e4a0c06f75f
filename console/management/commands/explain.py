"""Why a request went where it went: each decision with its candidates, what bound it, how it turned
out and what else could have been. Ended requests are read from the database; for one in flight
name the server, and give an operator's token on stdin."""

import json
import sys
from typing import Any

import httpx
from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from console import explaining
from console.templatetags.units import count, dash, ms_of_s

SERVER_S_MAX = 5.0
WIDTH_MIN = 140  # of output that no terminal limits
OUTCOME_STYLES = {"placed": "green", "queued": "yellow", "rejected": "red"}
CANDIDATE_COLUMNS = (
    *("queue", "prefill", "transfer", "TTFT", "p99", "ITL", "added", "hit blocks", "free", "score"),
)


class Command(BaseCommand):
    help = "Why a request went where it went, what was predicted and what came of it"
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request_id")
        parser.add_argument("--json", action="store_true", help="one object, as /api/v1 gives it")
        parser.add_argument(
            "--server",
            metavar="URL",
            help="ask this server instead of the database; reads an operator's token from stdin",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        request_id = options["request_id"]
        if options["server"]:
            shown = from_server(options["server"], request_id, sys.stdin.readline().strip())
        else:
            found = explaining.find(request_id)
            if not found:
                raise CommandError(
                    f"no decision about request {request_id} is stored here; for one in flight"
                    " name its server with --server"
                )
            shown = explaining.in_ms(found)
        if options["json"]:
            self.stdout.write(json.dumps(shown))
            return
        console = Console(file=self.stdout, width=None if sys.stdout.isatty() else WIDTH_MIN)
        console.print(story(explaining.in_seconds(shown)))


def from_server(url: str, request_id: str, token: str) -> dict[str, Any]:
    """The running server's answer. Raises CommandError with the reason."""
    try:
        response = httpx.get(
            f"{url.rstrip('/')}/api/v1/decisions/{request_id}/",
            headers={"authorization": f"Bearer {token}"},
            timeout=SERVER_S_MAX,
            trust_env=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(f"{url}: {error}") from error
    if response.status_code != 200:
        raise CommandError(f"{url} answered {response.status_code} for request {request_id}")
    answer: dict[str, Any] = response.json()
    return answer


def story(explained: dict[str, Any]) -> RenderableType:
    """Everything, from the arrival to the outcome."""
    head = Text.assemble(
        (explained["request_id"], "bold"),
        f"  {explained['tenant_id']} · {explained['model_id']} · {explained['class_name']} ·"
        f" {count(explained['prompt_tokens'])} prompt tokens, at most"
        f" {count(explained['output_tokens_max'])} more",
    )
    parts: list[RenderableType] = [head]
    for index, record in enumerate(explaining.decision_rows(explained)):
        parts.append(decision(record))
        if index == 0 and explained["records_left_out"]:
            parts.append(Text(f"{explained['records_left_out']} more were not kept", "dim"))
    outcome = explained["outcome"]
    parts.append(comparison(explained) if outcome else Text("It has not ended yet.", "dim"))
    if explained["counterfactuals"]:
        parts.append(otherwise(explained["counterfactuals"]))
    return Group(*parts)


def decision(record: dict[str, Any]) -> Panel:
    outcome = record["outcome"]
    title = Text(outcome, f"bold {OUTCOME_STYLES[outcome]}")
    title.append(
        f"  {ms_of_s(record['after_s'])} after arrival, epoch {record['epoch']}", "default"
    )
    if record["cause_text"]:
        title.append(f", {record['cause_text']}", "yellow")
    lines: list[RenderableType] = [Text(record["reason"])]
    lines.append(Text(f"decided by: {record['bound_text']}", "dim"))
    if record["split_reason"]:
        lines.append(Text(record["split_reason"], "dim"))
    if record["candidates"]:
        lines.append(candidates(record))
    return Panel(Group(*lines), title=title, title_align="left")


def candidates(record: dict[str, Any]) -> Table:
    table = Table("worker", "role", box=None, pad_edge=False)
    for name in CANDIDATE_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in record["candidates"]:
        is_chosen = row["worker_id"] in record["chosen"]
        seconds = ("queue_s", "prefill_s", "transfer_s", "ttft_s", "ttft_s_p99", "itl_s")
        table.add_row(
            row["worker_id"],
            row["role"],
            *(ms_of_s(row[name]) for name in (*seconds, "itl_added_s")),
            count(row["hit_blocks"]),
            count(row["free_blocks"]),
            f"{row['score']:.3f}",
            "chosen" if is_chosen else Text(row["reason"] or "eligible"),
            style="bold" if is_chosen else "" if row["eligible"] else "dim",
        )
    return table


def comparison(explained: dict[str, Any]) -> Panel:
    """Promise, prediction and outcome."""
    table = Table("", "target", "predicted", "p99", "measured", "", box=None, pad_edge=False)
    for row in explaining.comparisons(explained):
        cells = (row.target_s, row.predicted_s, row.predicted_s_p99, row.measured_s)
        style = "red" if row.is_over else ""
        table.add_row(row.name, *(dash(ms_of_s(cell)) for cell in cells), row.error, style=style)
    outcome = explained["outcome"]
    title = Text(outcome["status"], "bold green" if outcome["is_met"] else "bold red")
    title.append(f"  {count(outcome['output_tokens'])} output tokens", "default")
    return Panel(table, title=title, title_align="left")


def otherwise(items: list[dict[str, Any]]) -> Panel:
    table = Table("change", "to", "in time", "what it means", box=None, pad_edge=False)
    for item in items:
        style = "" if item["is_met"] else "dim"
        is_met = "yes" if item["is_met"] else "no"
        table.add_row(item["kind"], item["name"], is_met, Text(item["text"]), style=style)
    return Panel(table, title="what else could have been", title_align="left")
