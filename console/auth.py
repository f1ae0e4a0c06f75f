"""API keys of tenants and tokens of operators: making, checking, and who may see a page.

A key is `sk-sw-<8 public id>-<43 secret><6 checksum>` in base62, an operator's token `op-sw-…`.
Stored are the public id and HMAC-SHA256(pepper, secret): a fast hash is right for 256 random bits.
"""

import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any

from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils import timezone
from django_htmx.http import HttpResponseClientRedirect
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from console.models import ApiToken
from console.snapshot import KeyFacts, Snapshot

TENANT_PREFIX = "sk-sw"
OPERATOR_PREFIX = "op-sw"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
PUBLIC_CHARS = 8
SECRET_CHARS = 43  # 62**43 > 2**256
CHECKSUM_CHARS = 6  # 62**6 > 2**32
_PATTERN = re.compile(
    rf"(sk-sw|op-sw)-([0-9A-Za-z]{{{PUBLIC_CHARS}}})-"
    rf"([0-9A-Za-z]{{{SECRET_CHARS}}})([0-9A-Za-z]{{{CHECKSUM_CHARS}}})",
    re.ASCII,
)
_NO_HMAC = bytes(32)  # compared with when the id is unknown, so that both refusals do the same work


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A key whose checksum is right; nothing is known about it yet."""

    prefix: str
    public_id: str
    secret: str


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: `text` is shown once, the rest is stored."""

    text: str
    public_id: str
    secret_hmac: bytes
    last4: str


def mint_key(prefix: str = TENANT_PREFIX) -> MintedKey:
    """A fresh key; only `text` reveals the secret."""
    public_id = "".join(secrets.choice(BASE62) for _ in range(PUBLIC_CHARS))
    secret = "".join(secrets.choice(BASE62) for _ in range(SECRET_CHARS))
    body = f"{prefix}-{public_id}-{secret}"
    text = body + _checksum(body)
    return MintedKey(text, public_id, secret_hmac(secret), text[-4:])


def parse_key(text: str) -> ParsedKey | None:
    """The parts of a well-formed key, or None: a mistyped key is refused without a lookup."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    prefix, public_id, secret, checksum = match.groups()
    if _checksum(text[:-CHECKSUM_CHARS]) != checksum:
        return None
    return ParsedKey(prefix, public_id, secret)


def verify(snapshot: Snapshot, text: str, now: datetime | None = None) -> KeyFacts | None:
    """The tenant key `text` stands for, or None when it is unknown, wrong, revoked or expired."""
    parsed = parse_key(text)
    if parsed is None or parsed.prefix != TENANT_PREFIX:
        return None
    facts = snapshot.keys.get(parsed.public_id)
    stored = _NO_HMAC if facts is None else facts.secret_hmac
    is_right = hmac.compare_digest(secret_hmac(parsed.secret), stored)
    if facts is None or not is_right or not is_good(snapshot, facts, now):
        return None
    return facts


def is_good(snapshot: Snapshot, facts: KeyFacts, now: datetime | None = None) -> bool:
    """Neither revoked nor expired, and of an active tenant."""
    if not facts.is_active or facts.tenant_id not in snapshot.tenants:
        return False
    return facts.expires_at is None or facts.expires_at > (now or timezone.now())


def secret_hmac(secret: str) -> bytes:
    """What is stored of a secret."""
    return hmac.new(settings.SLACKWATER_PEPPER, secret.encode(), hashlib.sha256).digest()


def _checksum(body: str) -> str:
    value = zlib.crc32(body.encode())
    digits = []
    for _ in range(CHECKSUM_CHARS):
        value, digit = divmod(value, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def operator_required(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Pages are for staff: a stranger is sent to the login, another user is refused with 403."""

    @wraps(view)
    def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if not request.user.is_authenticated:
            response = redirect_to_login(request.get_full_path())
            if getattr(request, "htmx", None):
                return HttpResponseClientRedirect(response.url)
            return response
        if not request.user.is_staff:
            raise PermissionDenied("this page is for operators")
        return view(request, *args, **kwargs)

    return wrapped


class OperatorTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer op-sw-…` for `/api/v1/`."""

    def authenticate(self, request: Request) -> tuple[Any, ApiToken] | None:
        words = get_authorization_header(request).split()
        if not words or words[0].lower() != b"bearer":
            return None
        try:
            text = b" ".join(words[1:]).decode("ascii")
        except UnicodeDecodeError:
            raise AuthenticationFailed("The token is not valid.") from None
        token = find_operator_token(text)
        if token is None:
            raise AuthenticationFailed("The token is not valid.")
        return token.user, token

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="slackwater"'


def find_operator_token(text: str) -> ApiToken | None:
    """The live token of an active user, or None."""
    parsed = parse_key(text)
    if parsed is None or parsed.prefix != OPERATOR_PREFIX:
        return None
    token = ApiToken.objects.select_related("user").filter(public_id=parsed.public_id).first()
    stored = _NO_HMAC if token is None else bytes(token.secret_hmac)
    is_right = hmac.compare_digest(secret_hmac(parsed.secret), stored)
    if token is None or not is_right or not token.is_active or not token.user.is_active:
        return None
    if token.expires_at is not None and token.expires_at <= timezone.now():
        return None
    return token


class IsOperator(BasePermission):
    """Staff users only."""

    message = "This is for operators."

    def has_permission(self, request: Request, view: Any) -> bool:
        return bool(request.user and request.user.is_authenticated and request.user.is_staff)
