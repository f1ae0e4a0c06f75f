"""Accounts of operators: a staff user for the pages, and a token for `/api/v1/`."""

import json
import sys
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.utils.crypto import get_random_string

from console.auth import OPERATOR_PREFIX, mint_key
from console.models import ApiToken

PASSWORD_CHARS = 20


class Command(BaseCommand):
    help = "Create an operator with a token for /api/v1/ (password and token are shown once)"

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        create = actions.add_parser("create", help="create the user, or a new token for one")
        create.add_argument("name")
        create.add_argument("--password-stdin", action="store_true", help="read it from stdin")
        create.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        password = sys.stdin.readline().rstrip("\n") if options["password_stdin"] else None
        with transaction.atomic():
            password_shown = ensure_operator(options["name"], password)
            token = new_token(options["name"])
        answer = {"name": options["name"], "password": password_shown, "token": token}
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        self.stdout.write(f"operator  {options['name']}")
        self.stdout.write(f"password  {password_shown or '(unchanged)'}")
        self.stdout.write(f"token     {token}")
        self.stdout.write("Password and token are not shown again.")


def ensure_operator(name: str, password: str | None) -> str | None:
    """Create the user, or set the given password; gives a password that was made here."""
    user = get_user_model().objects.filter(username=name).first()
    if user is not None and password is None:
        return None
    made = None if password is not None else get_random_string(PASSWORD_CHARS)
    chosen = made if password is None else password
    if user is None:
        user = get_user_model()(username=name, is_staff=True, is_superuser=True)
        try:
            user.clean_fields(exclude=["password"])
        except ValidationError as error:
            raise CommandError(f"{name!r}: {error.messages[0]}", returncode=2) from None
    try:
        validate_password(chosen, user)
    except ValidationError as error:
        raise CommandError(f"password: {error.messages[0]}", returncode=2) from None
    user.set_password(chosen)
    user.save()
    return made


def new_token(name: str) -> str:
    """A fresh token of an existing operator."""
    minted = mint_key(OPERATOR_PREFIX)
    ApiToken.objects.create(
        user=get_user_model().objects.get(username=name),
        name="made by the operator command",
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
    )
    return minted.text
