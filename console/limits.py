"""How full each limit of a contract is, and which one would refuse next."""

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.ledger import AccountView


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: what counts against it now, and where it ends."""

    name: str
    used: float
    limit: float
    is_usd: bool = False

    @property
    def used_ratio(self) -> float:
        return self.used / self.limit if self.limit else 1.0


def of_account(account: AccountView) -> list[Limit]:
    """The limits of a contract in force, in the order in which admission checks them."""
    contract = account.contract
    limits = []
    if not contract.is_batch:
        limits.append(Limit("in flight", account.num_running, contract.concurrency_max))
    if contract.budget_tokens is not None:
        used = account.spent_tokens + account.held_tokens
        limits.append(Limit("tokens this month", used, contract.budget_tokens))
    if contract.budget_usd is not None:
        used_usd = account.spent_usd + account.held_usd
        limits.append(Limit("dollars this month", used_usd, contract.budget_usd, is_usd=True))
    limits.append(Limit("requests/min", account.requests_last_min, contract.requests_per_min))
    limits.append(Limit("tokens/min", account.tokens_last_min, contract.tokens_per_min))
    return limits


def binding(limits: Iterable[Limit]) -> Limit | None:
    """The fullest limit, the first of equals: the one that is met first if use grows evenly."""
    return max(limits, key=lambda limit: limit.used_ratio, default=None)
