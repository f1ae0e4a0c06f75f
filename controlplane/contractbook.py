"""One contract counted again from outside, for the laws about limits: neither overrun (I5), nor
refused where there was room.

The ledger counts whole seconds, so a refusal may be up to one second too careful.
"""

from collections import deque
from dataclasses import dataclass, field
from math import inf

from controlplane.domain import Contract, Rejected
from controlplane.ledger import BURST_S, AccountView, price_usd

MINUTE_S = 60.0
ROUNDING_S = 1.0
ROUNDING = 1e-6


@dataclass(slots=True)
class ContractBook:
    """Give it every admission and every end, in order."""

    contract: Contract
    guaranteed: deque[tuple[float, str]] = field(default_factory=deque)  # of the last minute
    tokens: dict[str, int] = field(default_factory=dict)  # that count for the rate, of those
    held: dict[str, int] = field(default_factory=dict)  # worst case, of running requests
    billed_tokens: int = 0
    billed_usd: float = 0.0
    ahead: tuple[float, float] = (0.0, 0.0)  # requests and tokens above the rates
    ahead_at_s: float = 0.0
    paced: dict[str, int] = field(default_factory=dict)  # tokens taken by running requests

    def change(self, contract: Contract) -> None:
        """Which rates count for the time before a change is not seen from here."""
        if contract != self.contract:
            self.contract, self.ahead = contract, (inf, inf)

    def demoted(self, code: str, now_s: float) -> None:
        """It says what of the contract was used up."""
        if code != "contract_pace":
            return
        self._take(0.0, 0.0, now_s)
        per_s = self._rates_s()
        is_ahead = any(
            used >= max(1.0, BURST_S * rate) - ROUNDING
            for used, rate in zip(self.ahead, per_s, strict=True)
        )
        assert is_ahead, f"I5: {self.contract.name} is behind its rates: {self.ahead}, {per_s}"

    def _rates_s(self) -> tuple[float, float]:
        contract = self.contract
        return contract.requests_per_min / MINUTE_S, contract.tokens_per_min / MINUTE_S

    def _take(self, requests: float, tokens: float, now_s: float) -> None:
        """A bucket that leaks at the contract's rates. The ledger's leaks at times more, for time
        in which nothing was asked of it, and never less."""
        passed_s, self.ahead_at_s = now_s - self.ahead_at_s, now_s
        (used, used_tokens), (rate, token_rate) = self.ahead, self._rates_s()
        self.ahead = (
            max(0.0, max(0.0, used - passed_s * rate) + requests),
            max(0.0, max(0.0, used_tokens - passed_s * token_rate) + tokens),
        )

    def admitted(self, name: str, tokens: int, is_guaranteed: bool, now_s: float) -> None:
        """The contract's limits must have had room for it."""
        contract = self.contract
        self.held[name] = tokens
        if contract.budget_tokens is not None:
            held = sum(self.held.values())
            assert self.billed_tokens + held <= contract.budget_tokens, (
                f"I5: {contract.name} has used {self.billed_tokens} and holds {held} tokens"
            )
        if contract.is_batch:
            return
        running = len(self.held)
        assert running <= contract.concurrency_max, f"I5: {running} requests of {contract.name} run"
        if not is_guaranteed:
            return
        self._take(1.0, tokens, now_s)
        self.paced[name] = tokens
        self.guaranteed.append((now_s, name))
        self.tokens[name] = tokens
        while self.guaranteed[0][0] <= now_s - MINUTE_S - ROUNDING_S:
            del self.tokens[self.guaranteed.popleft()[1]]
        requests, total = self._since(now_s - MINUTE_S)
        assert requests <= contract.requests_per_min, f"I5: {requests} requests of {contract.name}"
        assert total <= contract.tokens_per_min, f"I5: {total} tokens a minute of {contract.name}"

    def _since(self, at_s: float) -> tuple[int, int]:
        """Requests and tokens admitted after that time."""
        names = [name for admitted_s, name in self.guaranteed if admitted_s > at_s]
        return len(names), sum(self.tokens[name] for name in names)

    def settled(
        self, name: str, prompt_tokens: int, output_tokens: int, is_billed: bool, now_s: float
    ) -> None:
        self.held.pop(name, None)
        tokens = prompt_tokens + output_tokens if is_billed else 0
        if name in self.paced:
            self._take(0.0, tokens - self.paced.pop(name), now_s)
        self.billed_tokens += tokens
        if is_billed:
            self.billed_usd += price_usd(self.contract, prompt_tokens, output_tokens)
        if name in self.tokens:
            self.tokens[name] = tokens

    def refused(self, outcome: Rejected, tokens: int, now_s: float) -> None:
        """The limit that it names must have been reached; and it is told a time that is enough."""
        contract, code = self.contract, outcome.code
        if code == "contract_concurrency":
            assert len(self.held) >= contract.concurrency_max, f"I5: {code} at {len(self.held)}"
        elif code == "contract_budget":
            used = self.billed_tokens + sum(self.held.values())
            limit = contract.budget_tokens
            is_over = limit is not None and used + tokens > limit
            assert is_over or contract.budget_usd is not None, f"I5: {code} at {used} of {limit}"
        elif code == "contract_rate":
            self._refused_rate(outcome.retry_after_s, tokens, now_s)

    def _refused_rate(self, retry_s: float | None, tokens: int, now_s: float) -> None:
        contract = self.contract
        if retry_s is None:
            assert tokens > contract.tokens_per_min, f"I5: {tokens} tokens never fit {contract}"
            return
        assert 0.0 < retry_s <= MINUTE_S + ROUNDING_S, f"I5: retry after {retry_s} s"
        before_s = now_s - MINUTE_S - ROUNDING_S
        assert self._is_full(before_s, tokens), f"I5: {contract.name} was not at its rate"
        free_s = now_s + retry_s - MINUTE_S
        assert not self._is_full(free_s, tokens), f"I5: retry after {retry_s} s is too soon"
        soon_s = free_s - 2.0 * ROUNDING_S
        assert self._is_full(soon_s, tokens), f"I5: retry after {retry_s} s is too late"

    def _is_full(self, since_s: float, tokens: int) -> bool:
        requests, total = self._since(since_s)
        is_over = requests + 1 > self.contract.requests_per_min
        return is_over or total + tokens > self.contract.tokens_per_min

    def compare(self, account: AccountView, now_s: float) -> None:
        """The ledger's account says the same."""
        spent, usd, running = account.spent_tokens, account.spent_usd, account.num_running
        billed = self.billed_tokens
        assert spent == billed, f"I6: billed {spent}, delivered {billed}"
        assert abs(usd - self.billed_usd) < 1e-6, f"I6: billed ${usd}, ${self.billed_usd}"
        assert running == len(self.held), f"I6: {running} held, {len(self.held)} run"
        held = sum(self.held.values())
        assert account.held_tokens == held, f"I6: {account.held_tokens} tokens held, {held}"
        if self.contract.is_batch:
            return
        least = self._since(now_s - MINUTE_S)
        most = self._since(now_s - MINUTE_S - ROUNDING_S)
        counted = (account.requests_last_min, account.tokens_last_min)
        for low, count, high in zip(least, counted, most, strict=True):
            assert low <= count <= high, f"I5: {counted} in a minute, from {least} to {most}"
