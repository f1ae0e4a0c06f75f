"""Dollars from measured busy time: what a token really cost on the devices that made it."""

SECONDS_PER_HOUR = 3600.0
MILLION = 1_000_000


def busy_usd(busy_s: float, gpu_hour_usd: float) -> float:
    """Price of `busy_s` device seconds at an hourly price."""
    assert busy_s >= 0 and gpu_hour_usd >= 0, f"busy_s={busy_s} gpu_hour_usd={gpu_hour_usd}"
    return busy_s * gpu_hour_usd / SECONDS_PER_HOUR


def usd_per_million(busy_s: float, gpu_hour_usd: float, num_tokens: int) -> float | None:
    """Dollars for a million tokens like these `num_tokens`; None when there were none."""
    assert num_tokens >= 0, f"num_tokens={num_tokens}"
    if num_tokens == 0:
        return None
    return busy_usd(busy_s, gpu_hour_usd) / num_tokens * MILLION
