#!/usr/bin/env python3
"""Entry of every management command; a wrong setting, or a database that is away or without our
tables, ends in one line, not in a traceback (`--traceback` shows it)."""

import os
import sys

from django.core.management import execute_from_command_line
from django.db.utils import OperationalError, ProgrammingError

from controlplane.errors import ConfigError


def main() -> int:
    """Run the command named on the command line."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "console.settings")
    try:
        execute_from_command_line(sys.argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OperationalError, ProgrammingError) as error:
        if "--traceback" in sys.argv:
            raise
        why = " ".join(str(error).split())
        print(f"error: database: {why} (tables: `manage.py migrate`)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
