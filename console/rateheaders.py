"""Rate limits as response headers, in the words of OpenAI's API."""

from controlplane.ledger import RateView

Headers = list[tuple[bytes, bytes]]


def rate_headers(rates: tuple[RateView, RateView] | None) -> Headers:
    """`x-ratelimit-*` of requests and tokens; none where no contract sets a rate."""
    if rates is None:
        return []
    headers: Headers = []
    for name, rate in zip((b"requests", b"tokens"), rates, strict=True):
        headers += [
            (b"x-ratelimit-limit-" + name, b"%d" % rate.limit),
            (b"x-ratelimit-remaining-" + name, b"%d" % rate.remaining),
            (b"x-ratelimit-reset-" + name, go_duration(rate.reset_s).encode()),
        ]
    return headers


def go_duration(seconds: float) -> str:
    """As Go prints a duration: 20ms, 1s, 1.5s, 6m0s."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
