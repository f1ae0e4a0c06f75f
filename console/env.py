"""Environment -> one frozen `Env`; a bad or unknown key stops the start and is named."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from controlplane.errors import ConfigError

Profile = Literal["local", "public"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# Keys with our prefix that other programs of this repository read: workers, converter, tests.
FOREIGN_KEYS = frozenset(
    {
        "SLACKWATER_CACHE",
        "SLACKWATER_JOIN_TOKEN",
        "SLACKWATER_REQUIRE",
        "SLACKWATER_TEST_DATABASE_URL",
        "SLACKWATER_TEST_MODEL",
        "SLACKWATER_TEST_REDIS_URL",
    }
)
OWN_KEYS = frozenset(
    {"SLACKWATER_CALIBRATION", "SLACKWATER_PEPPER", "SLACKWATER_TRACES", "SLACKWATER_VAR"}
)
SECRET_CHARS_MIN = 32


@dataclass(frozen=True, slots=True)
class Env:
    """What the server takes from its environment."""

    var: Path  # files of this installation: database, secrets, collected static files, logs
    allowed_hosts: tuple[str, ...]
    csrf_trusted_origins: tuple[str, ...]
    secret_key: str | None
    pepper: str | None
    database: dict[str, str] | None  # PostgreSQL; None: SQLite in `var`
    redis_url: str | None
    gpu_hour_usd: float
    traces: str  # folder of workload traces, for `bench plane`; empty: none
    calibration: str  # file of step times, for `bench plane`; empty: the packaged ones

    @property
    def profile(self) -> Profile:
        """`local` when every allowed host is loopback, else `public`."""
        return "local" if all(host in LOOPBACK_HOSTS for host in self.allowed_hosts) else "public"


def read(environ: Mapping[str, str], root: Path) -> Env:
    """Read and check the environment; relative paths are below `root`. Raises ConfigError."""
    unknown = {k for k in environ if k.startswith("SLACKWATER_")} - OWN_KEYS - FOREIGN_KEYS
    if unknown:
        allowed = ", ".join(sorted(OWN_KEYS | FOREIGN_KEYS))
        raise ConfigError(f"{min(unknown)}: unknown setting, expected one of {allowed}")
    env = Env(
        var=(root / (environ.get("SLACKWATER_VAR") or "var")).resolve(),
        allowed_hosts=_hosts(environ),
        csrf_trusted_origins=_origins(environ),
        secret_key=_secret(environ, "SECRET_KEY"),
        pepper=_secret(environ, "SLACKWATER_PEPPER"),
        database=_database(environ),
        redis_url=_redis(environ),
        gpu_hour_usd=_usd(environ, "GPU_HOUR_USD", 3.0),
        traces=environ.get("SLACKWATER_TRACES", ""),
        calibration=environ.get("SLACKWATER_CALIBRATION", ""),
    )
    if env.profile == "public":
        for key, value in (("SECRET_KEY", env.secret_key), ("SLACKWATER_PEPPER", env.pepper)):
            if value is None:
                raise ConfigError(
                    f"{key} is missing: ALLOWED_HOSTS names a host that is not loopback, "
                    f"so set {key} to a secret of at least {SECRET_CHARS_MIN} characters"
                )
    return env


def _words(environ: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in environ.get(key, "").split(",") if word.strip())


def _hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    hosts = _words(environ, "ALLOWED_HOSTS") or LOOPBACK_HOSTS
    for host in hosts:
        if "/" in host or host == "*" or (":" in host and not host.startswith("[")):
            raise ConfigError(
                f"ALLOWED_HOSTS={host!r}: expected host names separated by commas, "
                "without scheme, port or '*'"
            )
    return hosts


def _origins(environ: Mapping[str, str]) -> tuple[str, ...]:
    origins = _words(environ, "CSRF_TRUSTED_ORIGINS")
    for origin in origins:
        if urlsplit(origin).scheme not in ("http", "https") or not urlsplit(origin).netloc:
            raise ConfigError(f"CSRF_TRUSTED_ORIGINS={origin!r}: expected https://host")
    return origins


def _secret(environ: Mapping[str, str], key: str) -> str | None:
    value = environ.get(key)
    if not value:
        return None
    if len(value) < SECRET_CHARS_MIN:
        raise ConfigError(f"{key}: {len(value)} characters, expected at least {SECRET_CHARS_MIN}")
    return value


def _database(environ: Mapping[str, str]) -> dict[str, str] | None:
    url = environ.get("DATABASE_URL")
    if not url:
        return None
    try:
        parts = urlsplit(url)
        port = str(parts.port or "")
    except ValueError:
        raise ConfigError("DATABASE_URL: not a URL, expected postgresql://…") from None
    if parts.scheme not in ("postgres", "postgresql"):
        raise ConfigError(
            f"DATABASE_URL: scheme {parts.scheme!r}, expected postgresql:// "
            "(leave it unset for SQLite)"
        )
    name = unquote(parts.path.lstrip("/"))
    if not name:
        raise ConfigError("DATABASE_URL: no database name, expected postgresql://host/name")
    return {
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": unquote(parts.hostname or ""),
        "PORT": port,
    }


def _redis(environ: Mapping[str, str]) -> str | None:
    url = environ.get("REDIS_URL")
    if not url:
        return None
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(f"REDIS_URL: scheme {urlsplit(url).scheme!r}, expected redis://…")
    return url


def _usd(environ: Mapping[str, str], key: str, default: float) -> float:
    raw = environ.get(key)
    if not raw:
        return default
    try:
        value = float(raw)
    except ValueError:
        raise ConfigError(f"{key}={raw!r}: expected a price in dollars such as 2.5") from None
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key}={raw!r}: expected a finite price of at least 0")
    return value
