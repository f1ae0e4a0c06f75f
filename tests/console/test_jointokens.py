"""Join tokens: signed, expiring, good once, bounded in memory."""

import time

from console import jointokens
from console.jointokens import SpentTokens


def test_token_is_accepted_until_it_is_spent():
    tokens, token = SpentTokens(), jointokens.mint("prefill-1")
    assert tokens.refusal(token) == ""
    assert tokens.refusal(token) == ""
    tokens.spend(token)
    assert "used before" in tokens.refusal(token)


def test_changed_and_foreign_tokens_are_refused():
    tokens, token = SpentTokens(), jointokens.mint("prefill-1")
    for text in ("", "x", token[:-1], token + "x", token.swapcase()):
        assert "not one of this installation" in tokens.refusal(text)


def test_token_expires():
    token = jointokens.mint("prefill-1", life_s=5)
    assert SpentTokens().refusal(token, now=time.time() + 4) == ""
    assert "expired" in SpentTokens().refusal(token, now=time.time() + 6)


def test_spent_tokens_are_bounded_and_make_room_when_they_expire():
    tokens = SpentTokens(spent_max=2)
    for life_s in (5, 100):
        tokens.spend(jointokens.mint("w", life_s))
    fresh = jointokens.mint("w", 1_000)
    assert "too many" in tokens.refusal(fresh)
    assert tokens.refusal(fresh, now=time.time() + 6) == ""
