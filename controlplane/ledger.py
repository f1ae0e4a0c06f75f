"""What each contract has reserved and used: rates, concurrency, budget, and whether it was met.

The worst case of a request is reserved when it is admitted and settled at its terminal event, so no
limit is ever overrun, whatever the outputs turn out to be. A rate counts what was admitted in any
60 s; its worst case until it is settled, then what it really took.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.domain import (
    Contract,
    ContractKey,
    Demotion,
    GenerateRequest,
    Rejected,
    Spent,
    Tier,
)

RATE_BUCKETS = 61  # whole seconds that may overlap any 60 s
BURN_BUCKET_S = 60
BURN_BUCKETS = 60  # an hour
BURN_FAST_BUCKETS = 5
MILLION = 1_000_000
MINUTE_S = 60.0
BURST_S = 1.0  # of a contract's rates that may come at once while others wait: a burst is a queue


@dataclass(frozen=True, slots=True)
class RateView:
    """One rate limit as a client is told of it."""

    limit: int
    remaining: int
    reset_s: float  # until nothing of the last minute counts any more


class RateWindow:
    """Amounts admitted in the last minute, by whole second; at most `limit` in any 60 s."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._amounts = [0] * RATE_BUCKETS
        self._second = 0  # newest second seen

    def _advance(self, now_s: float) -> None:
        second = int(now_s)
        for passed in range(max(self._second + 1, second - RATE_BUCKETS + 1), second + 1):
            self.total -= self._amounts[passed % RATE_BUCKETS]
            self._amounts[passed % RATE_BUCKETS] = 0
        self._second = max(self._second, second)

    def free_in_s(self, amount: int, now_s: float) -> float | None:
        """Seconds until `amount` fits, 0 for now; None when it is more than the limit."""
        self._advance(now_s)
        if amount > self.limit:
            return None
        over = self.total + amount - self.limit
        if over <= 0:
            return 0.0
        for second in range(self._second - RATE_BUCKETS + 1, self._second + 1):
            over -= self._amounts[second % RATE_BUCKETS]
            if over <= 0:
                return second + RATE_BUCKETS - now_s
        raise AssertionError((self.total, amount, self.limit))

    def add(self, amount: int, now_s: float) -> int:
        """Take room that free_in_s has just said is there; gives the second to refund it by."""
        self._advance(now_s)
        self.total += amount
        assert self.total <= self.limit, (self.total, self.limit)
        self._amounts[self._second % RATE_BUCKETS] += amount
        return self._second

    def view(self, now_s: float) -> RateView:
        self._advance(now_s)
        seconds = range(self._second, self._second - RATE_BUCKETS, -1)
        newest = next((s for s in seconds if self._amounts[s % RATE_BUCKETS]), None)
        reset_s = 0.0 if newest is None else newest + RATE_BUCKETS - now_s
        return RateView(self.limit, max(0, self.limit - self.total), reset_s)

    def refund(self, amount: int, second: int, now_s: float) -> None:
        """Give back what was added in `second`, when that second still counts."""
        self._advance(now_s)
        if second > self._second - RATE_BUCKETS:
            self._amounts[second % RATE_BUCKETS] -= amount
            self.total -= amount
            assert self._amounts[second % RATE_BUCKETS] >= 0, (amount, second)


class Pace:
    """A guaranteed share is a rate with a burst (algorithms.md 2g): what comes faster is ahead of
    it. Amounts may go into debt, so that one large request is never ahead for ever."""

    def __init__(self, burst_s: float) -> None:
        self._burst_s = burst_s
        self._used = 0.0  # amount above the rate, at most a burst's until it is ahead
        self._at_s = 0.0

    def is_ahead(self, per_min: int, now_s: float) -> bool:
        self._leak(per_min, now_s)
        return self._used >= max(1.0, self._burst_s * per_min / MINUTE_S)

    def add(self, amount: float) -> None:
        """What starts, and below 0 what was reserved and not used."""
        self._used = max(0.0, self._used + amount)

    def _leak(self, per_min: int, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._used = max(0.0, self._used - passed_s * per_min / MINUTE_S)
        self._at_s = max(self._at_s, now_s)


class ErrorBudget:
    """Requests met and missed, by minute: the error budget that is left and how fast it burns.

    Burn rate 1 uses up exactly the budget; source: Beyer et al., The Site Reliability Workbook,
    2018, chapter 5 (several windows)."""

    def __init__(self) -> None:
        self.num_met = 0
        self.num_missed = 0
        self._met = [0] * BURN_BUCKETS
        self._missed = [0] * BURN_BUCKETS
        self._minute = 0

    def observe(self, is_met: bool, now_s: float) -> None:
        self._advance(now_s)
        self.num_met += is_met
        self.num_missed += not is_met
        counts = self._met if is_met else self._missed
        counts[self._minute % BURN_BUCKETS] += 1

    def _advance(self, now_s: float) -> None:
        minute = int(now_s) // BURN_BUCKET_S
        for passed in range(max(self._minute + 1, minute - BURN_BUCKETS + 1), minute + 1):
            self._met[passed % BURN_BUCKETS] = self._missed[passed % BURN_BUCKETS] = 0
        self._minute = max(self._minute, minute)

    def burn_rate(self, attainment: float, num_minutes: int, now_s: float) -> float:
        """Miss rate of the last minutes over the one that the target allows; 0 without requests."""
        assert 1 <= num_minutes <= BURN_BUCKETS, num_minutes
        self._advance(now_s)
        recent = [(self._minute - back) % BURN_BUCKETS for back in range(num_minutes)]
        missed = sum(self._missed[index] for index in recent)
        total = missed + sum(self._met[index] for index in recent)
        return missed / total / (1.0 - attainment) if total else 0.0

    def left_share(self, attainment: float) -> float:
        """Share of the period's error budget that is left; below 0 when the target is missed."""
        total = self.num_met + self.num_missed
        return 1.0 - self.num_missed / (total * (1.0 - attainment)) if total else 1.0


@dataclass(frozen=True, slots=True)
class Hold:
    """What one admitted request has reserved of its contract."""

    key: ContractKey
    tier: Tier
    second: int
    tokens: int
    usd: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class AccountView:
    """A contract and where it stands, for pages and metrics."""

    contract: Contract
    num_running: int
    requests_last_min: int
    tokens_last_min: int
    spent_tokens: int
    spent_usd: float
    held_tokens: int
    held_usd: float
    num_met: int
    num_missed: int
    num_surplus: int
    error_budget_left: float
    burn_rate_fast: float  # over 5 minutes
    burn_rate_slow: float  # over an hour


class Account:
    """One contract's use."""

    def __init__(self, contract: Contract, spent: Spent | None = None) -> None:
        self.contract = contract
        self.requests = RateWindow(contract.requests_per_min)
        self.tokens = RateWindow(contract.tokens_per_min)
        self.paces = (Pace(BURST_S), Pace(BURST_S))  # requests, tokens
        self.objective = ErrorBudget()
        self.num_running = self.held_tokens = self.num_surplus = 0
        self.held_usd = 0.0
        self.spent_tokens = spent.tokens if spent else 0
        self.spent_usd = spent.usd if spent else 0.0

    def change(self, contract: Contract) -> None:
        """New limits take effect now. What is reserved stays so; a new period starts from 0."""
        if contract.period != self.contract.period:
            self.spent_tokens, self.spent_usd = 0, 0.0
            self.objective = ErrorBudget()
        self.contract = contract
        self.requests.limit = contract.requests_per_min
        self.tokens.limit = contract.tokens_per_min

    def refuse_hard(self, tokens: int, usd: float) -> Rejected | None:
        """Limits that no tier may pass: concurrency and budget."""
        contract = self.contract
        if not contract.is_batch and self.num_running >= contract.concurrency_max:
            text = f"{self.num_running} requests of contract {contract.name} are running or waiting"
            text = f"{text}, at most {contract.concurrency_max}"
            return Rejected("contract_concurrency", text, None)
        used = self.spent_tokens + self.held_tokens
        if contract.budget_tokens is not None and used + tokens > contract.budget_tokens:
            text = f"{used} tokens of contract {contract.name} are used or reserved, {tokens} more"
            text = f"{text} are asked for, at most {contract.budget_tokens} in {contract.period}"
            return Rejected("contract_budget", text, None)
        used_usd = self.spent_usd + self.held_usd
        if contract.budget_usd is not None and used_usd + usd > contract.budget_usd:
            text = f"${used_usd:.4f} of contract {contract.name} are used or reserved, ${usd:.4f}"
            text = f"{text} more are asked for, at most ${contract.budget_usd:.2f}"
            return Rejected("contract_budget", f"{text} in {contract.period}", None)
        return None

    def over_rate(self, tokens: int, now_s: float) -> Rejected | None:
        """The rate limits; retry_after_s is exact: then the request would be within them."""
        contract = self.contract
        waits = []
        for window, amount in ((self.requests, 1), (self.tokens, tokens)):
            wait_s = window.free_in_s(amount, now_s)
            if wait_s is None:
                text = f"{amount} tokens of one request, contract {contract.name} allows"
                return Rejected("contract_rate", f"{text} {window.limit} a minute", None)
            waits.append(wait_s)
        if max(waits) <= 0.0:
            return None
        text = (
            f"contract {contract.name} has used {self.requests.total} of"
            f" {contract.requests_per_min} requests and {self.tokens.total} of"
            f" {contract.tokens_per_min} tokens in this minute, {tokens} more are asked for"
        )
        return Rejected("contract_rate", text, max(waits))

    def ahead_of_pace(self, now_s: float) -> Demotion | None:
        """Within its minute, but faster than the share that is kept free for it: where others wait
        it takes no more than its share, and the rest is served in what is left."""
        contract = self.contract
        rates = (contract.requests_per_min, contract.tokens_per_min)
        for pace, per_min, name in zip(self.paces, rates, ("requests", "tokens"), strict=True):
            if pace.is_ahead(per_min, now_s):
                text = (
                    f"contract {contract.name} is more than {BURST_S:.0f} s ahead of its"
                    f" {per_min} {name} a minute while others wait"
                )
                return Demotion("contract_pace", text)
        return None


class Ledger:
    """All accounts, and the hold of every admitted request until it is settled."""

    def __init__(self) -> None:
        self._accounts: dict[ContractKey, Account] = {}
        self._ended: set[ContractKey] = set()  # no longer in force, requests still run
        self._holds: dict[str, Hold] = {}

    def set_contracts(self, contracts: Iterable[Contract], spent: Iterable[Spent] = ()) -> None:
        """The contracts in force from now on. An account that is no longer named ends when its
        last request does; `spent` starts the accounts that are new here."""
        before = {item.key: item for item in spent}
        new = {contract.key: contract for contract in contracts}
        for key, contract in new.items():
            if account := self._accounts.get(key):
                account.change(contract)
            else:
                self._accounts[key] = Account(contract, before.get(key))
        held = {hold.key for hold in self._holds.values()}
        self._ended = {key for key in self._accounts if key not in new}
        for key in self._ended - held:
            del self._accounts[key]
        self._ended &= held

    def account(self, request: GenerateRequest) -> Account | None:
        """The contract that the request comes under, if any."""
        key = (request.tenant_id, request.model_id, request.slo.name)
        return None if key in self._ended else self._accounts.get(key)

    def rates(self, request: GenerateRequest, now_s: float) -> tuple[RateView, RateView] | None:
        """Requests and tokens a minute of the request's contract, None without one."""
        account = self.account(request)
        if account is None:
            return None
        return account.requests.view(now_s), account.tokens.view(now_s)

    def reserve(self, account: Account, request: GenerateRequest, tier: Tier, now_s: float) -> None:
        """Debit the worst case. The caller has asked refuse_hard, and for the guaranteed tier
        over_rate. The surplus tier and batch take no part in the rates."""
        assert request.request_id not in self._holds, request.request_id
        tokens, usd = worst_case(account.contract, request)
        assert account.refuse_hard(tokens, usd) is None, (account.contract, tokens, usd)
        second = -1
        if tier == "guaranteed" and not account.contract.is_batch:
            account.requests.add(1, now_s)
            second = account.tokens.add(tokens, now_s)
            for pace, amount in zip(account.paces, (1, tokens), strict=True):
                pace.add(amount)
        account.num_running += 1
        account.num_surplus += tier == "surplus"  # since the start, not now
        account.held_tokens += tokens
        account.held_usd += usd
        self._holds[request.request_id] = Hold(
            account.contract.key, tier, second, tokens, usd, request.prompt_tokens
        )

    def settle(
        self, request_id: str, output_tokens: int, is_started: bool, now_s: float
    ) -> tuple[int, float]:
        """The terminal event: what was used is spent, the rest is free again. Gives the tokens and
        dollars billed: the prompt once, and each id that was delivered; nothing when no worker
        ever had it. A request without a contract bills nothing here."""
        hold = self._holds.pop(request_id, None)
        if hold is None:
            return 0, 0.0
        account = self._accounts[hold.key]
        contract = account.contract
        tokens = hold.prompt_tokens + output_tokens if is_started else 0
        assert tokens <= hold.tokens, (request_id, tokens, hold.tokens)
        usd = min(hold.usd, price_usd(contract, hold.prompt_tokens, output_tokens))
        usd = usd if is_started else 0.0
        if hold.second >= 0:
            account.tokens.refund(hold.tokens - tokens, hold.second, now_s)
            account.paces[1].add(tokens - hold.tokens)
        account.num_running -= 1
        account.held_tokens -= hold.tokens
        account.held_usd = account.held_usd - hold.usd if account.num_running else 0.0
        account.spent_tokens += tokens
        account.spent_usd += usd
        if hold.key in self._ended and not account.num_running:
            self._ended.discard(hold.key)
            del self._accounts[hold.key]
        return tokens, usd

    def contracts(self) -> tuple[Contract, ...]:
        return tuple(
            account.contract for key, account in self._accounts.items() if key not in self._ended
        )

    def views(self, now_s: float) -> tuple[AccountView, ...]:
        return tuple(_view(account, now_s) for account in self._accounts.values())

    def check_integrity(self, tracked: Iterable[str]) -> None:
        """Every hold belongs to a live request, and sums equal the holds they stand for."""
        assert set(self._holds) <= set(tracked), set(self._holds) - set(tracked)
        for key, account in self._accounts.items():
            holds = [hold for hold in self._holds.values() if hold.key == key]
            assert account.num_running == len(holds), (key, account.num_running, len(holds))
            assert account.held_tokens == sum(hold.tokens for hold in holds), key
            assert abs(account.held_usd - sum(hold.usd for hold in holds)) < 1e-6, key


def price_usd(contract: Contract, prompt_tokens: int, output_tokens: int) -> float:
    dollars = contract.usd_per_million_prompt * prompt_tokens
    return (dollars + contract.usd_per_million_output * output_tokens) / MILLION


def worst_case(contract: Contract, request: GenerateRequest) -> tuple[int, float]:
    """Tokens and dollars that the request can cost at most."""
    tokens = request.prompt_tokens + request.output_tokens_max
    return tokens, price_usd(contract, request.prompt_tokens, request.output_tokens_max)


def _view(account: Account, now_s: float) -> AccountView:
    contract, objective = account.contract, account.objective
    account.requests.free_in_s(0, now_s)  # both windows move on to now
    account.tokens.free_in_s(0, now_s)
    return AccountView(
        contract=contract,
        num_running=account.num_running,
        requests_last_min=account.requests.total,
        tokens_last_min=account.tokens.total,
        spent_tokens=account.spent_tokens,
        spent_usd=account.spent_usd,
        held_tokens=account.held_tokens,
        held_usd=account.held_usd,
        num_met=objective.num_met,
        num_missed=objective.num_missed,
        num_surplus=account.num_surplus,
        error_budget_left=objective.left_share(contract.attainment),
        burn_rate_fast=objective.burn_rate(contract.attainment, BURN_FAST_BUCKETS, now_s),
        burn_rate_slow=objective.burn_rate(contract.attainment, BURN_BUCKETS, now_s),
    )
