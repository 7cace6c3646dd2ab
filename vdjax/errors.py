"""Errors a user can act on."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the place (file, row or key), what was expected and the nearest valid name."""


def nearest(name: object, valid: Iterable[object]) -> str:
    """A hint to append to an error message: the valid name closest to `name`, or all of them when none is close."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"
