"""What the Queues & SLO page shows: who waits, how promises stand, how full the system is.

Pure functions of views of the control plane; no row of the database is read.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from console import state
from console.live import milliseconds
from controlplane import domain
from controlplane.ledger import AccountView
from controlplane.overload import RUNGS, OverloadView

WAITING_MAX = 50  # rows of class and tenant
CONTRACTS_MAX = 100  # rows; those whose error budget burns fastest
BURN_BAD = (
    14.4  # The Site Reliability Workbook, 2018, chapter 5: 2 % of a month's budget in an hour
)
BURN_WARN = 6.0  # 5 % in six hours
RUNG_WORDS = (
    "everything is served",
    "no batch line starts",
    "no surplus request starts",
    "tenants above their share are refused",
    "only work in flight goes on",
)


def part(current: state.ServerState, query: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Template and context of what the live socket replaces; on the event loop."""
    return "console/queues.html#swap", context(current, query.get("tenant", ""))


def context(current: state.ServerState, tenant_id: str) -> dict[str, Any]:
    """Everything on the page that changes by the second; on the event loop."""
    fleet = current.fleet
    view = fleet.view()
    return {
        "classes": class_rows(current.live.class_rows(fleet.now_s()), view),
        "waiting": waiting_rows(view.requests, tenant_id),
        "contracts": contract_rows(fleet.accounts(), tenant_id),
        "overload": overload_row(fleet.overload()),
    }


def class_rows(
    measured: Iterable[dict[str, Any]], view: domain.ClusterView
) -> list[dict[str, Any]]:
    """Each class: what waits and runs, and how its promise was kept in the last minute."""
    waiting = dict(view.queued_by_class)
    running: dict[str, int] = defaultdict(int)
    oldest_s: dict[str, float] = defaultdict(float)
    for request in view.requests:
        name = request.class_name
        if request.phase == "queued":
            oldest_s[name] = max(oldest_s[name], request.phase_s)
        else:
            running[name] += 1
    rows = []
    for row in measured:
        name = row["name"]
        rows.append(
            {
                **row,
                "waiting": waiting.get(name, 0),
                "running": running[name],
                "oldest_ms": milliseconds(oldest_s[name]) if name in oldest_s else None,
            }
        )
    return rows


def waiting_rows(
    requests: Iterable[domain.RequestView], tenant_id: str = ""
) -> list[dict[str, Any]]:
    """Waiting requests by class and tenant, who has waited longest first."""
    waits: dict[tuple[str, str], list[domain.RequestView]] = defaultdict(list)
    for request in requests:
        if request.phase == "queued" and tenant_id in ("", request.tenant_id):
            waits[request.class_name, request.tenant_id].append(request)
    rows = []
    for (class_name, tenant), waiting in waits.items():
        oldest = max(waiting, key=lambda request: request.phase_s)
        rows.append(
            {
                "class_name": class_name,
                "tenant_id": tenant,
                "waiting": len(waiting),
                "oldest_s": oldest.phase_s,
                "oldest_id": oldest.request_id,
                "prompt_tokens": sum(request.prompt_tokens for request in waiting),
            }
        )
    rows.sort(key=lambda row: (-row["oldest_s"], row["class_name"], row["tenant_id"]))
    return rows[:WAITING_MAX]


def contract_rows(accounts: Iterable[AccountView], tenant_id: str = "") -> list[dict[str, Any]]:
    """Contracts with their limits, the binding one named, and their error budgets."""
    chosen = [item for item in accounts if tenant_id in ("", item.contract.tenant_id)]
    chosen.sort(key=lambda item: (-item.burn_rate_slow, item.error_budget_left, item.contract.key))
    return [contract_row(item) for item in chosen[:CONTRACTS_MAX]]


def contract_row(account: AccountView) -> dict[str, Any]:
    contract = account.contract
    tokens, usd = account.spent_tokens + account.held_tokens, account.spent_usd + account.held_usd
    limits = [
        {"name": "in flight", "used": account.num_running, "limit": contract.concurrency_max},
        {
            "name": "requests/min",
            "used": account.requests_last_min,
            "limit": contract.requests_per_min,
        },
        {"name": "tokens/min", "used": account.tokens_last_min, "limit": contract.tokens_per_min},
        {"name": "tokens this month", "used": tokens, "limit": contract.budget_tokens},
        {"name": "$ this month", "used": usd, "limit": contract.budget_usd},
    ]
    known = [{**item, "ratio": _ratio(item["used"], item["limit"])} for item in limits]
    binding = max((item for item in known if item["limit"] is not None), key=lambda i: i["ratio"])
    num_ended = account.num_met + account.num_missed
    return {
        "contract": contract,
        "account": account,
        "limits": known,
        "binding": binding,
        "measured": account.num_met / num_ended if num_ended else None,
        "num_ended": num_ended,
        "status": burn_status(account),
    }


def burn_status(account: AccountView) -> str:
    """missed: the budget is gone, or it goes now and went for an hour; warn: it will."""
    if not account.num_met + account.num_missed:
        return "no_data"
    rates = (account.burn_rate_fast, account.burn_rate_slow)
    if account.error_budget_left < 0.0 or min(rates) >= BURN_BAD:
        return "missed"
    return "burning" if max(rates) >= BURN_WARN else "ok"


def overload_row(view: OverloadView) -> dict[str, Any]:
    """The rung in words, the next one, and the signals, highest first."""
    signals = sorted(view.signals.items(), key=lambda item: (-item[1], item[0]))
    return {
        "rung": view.rung,
        "words": RUNG_WORDS[view.rung],
        "bound": view.bound,
        "signals": [
            {"name": name, "share": share, "is_over": share >= RUNGS[0]} for name, share in signals
        ],
        "rungs": [
            {"share": share, "words": words, "is_on": view.rung > index}
            for index, (share, words) in enumerate(zip(RUNGS, RUNG_WORDS[1:], strict=True))
        ],
    }


def _ratio(used: float, limit: float | None) -> float:
    return used / limit if limit else float(used > 0 and limit is not None)
