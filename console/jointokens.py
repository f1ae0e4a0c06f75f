"""Tokens that let a worker join: signed by this installation, expiring, good for one Hello.

Signed with SECRET_KEY, so that `manage.py worker_token` can make one while `serve` runs elsewhere.
Which ones are spent is known to the serving process only, for as long as they live.
"""

import secrets
import time

from django.core import signing

SALT = "slackwater.join"
LIFE_S = 600.0  # a worker loads and measures its model before it joins
SPENT_MAX = 65_536  # spent tokens remembered; beyond it nobody joins until some expire


def mint(name: str, life_s: float = LIFE_S) -> str:
    """A token for a worker; `name` says in its payload whom it was meant for."""
    facts = {"name": name, "nonce": secrets.token_hex(8), "ends_at": time.time() + life_s}
    return signing.dumps(facts, salt=SALT)


class SpentTokens:
    """Remembers which tokens have let a worker in. Not thread-safe."""

    def __init__(self, spent_max: int = SPENT_MAX) -> None:
        self._spent_max = spent_max
        self._ends_at: dict[str, float] = {}  # nonce -> end of life, seconds since 1970

    def refusal(self, token: str, now: float | None = None) -> str:
        """Why the token is not accepted; empty when it is. Changes nothing."""
        now = time.time() if now is None else now
        try:
            facts = signing.loads(token, salt=SALT)
        except signing.BadSignature:
            return "the join token is not one of this installation"
        if facts["ends_at"] <= now:
            return "the join token has expired"
        if facts["nonce"] in self._ends_at:
            return "the join token was used before"
        if len(self._ends_at) >= self._spent_max:
            self._ends_at = {n: ends_at for n, ends_at in self._ends_at.items() if ends_at > now}
        return "" if len(self._ends_at) < self._spent_max else "too many join tokens are in use"

    def spend(self, token: str) -> None:
        """A worker has joined with this token, for which `refusal` was empty."""
        facts = signing.loads(token, salt=SALT)
        self._ends_at[facts["nonce"]] = facts["ends_at"]
