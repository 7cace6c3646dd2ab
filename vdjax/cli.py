"""How every command ends: a UserError is a message and status 2, never a traceback."""

import sys
from collections.abc import Callable

from vdjax.errors import UserError


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
