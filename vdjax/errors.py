"""Errors a user can act on."""

import difflib
from collections.abc import Iterable, Sequence

LINES, CHARACTERS = 24, 2000  # of a screen
MOST_NAMES, LONGEST_NAME = 30, 80  # in a list of names


class UserError(Exception):
    """Bad input. The message names the place (file, row or key), what was expected and the nearest valid name.

    It fits one screen, whatever the input quoted in it: `one_screen`.
    """

    status = 2  # with which a command ends

    def __str__(self) -> str:
        return one_screen(super().__str__())


def one_screen(text: str) -> str:
    """The text, without its middle where it has more than LINES lines or CHARACTERS characters."""
    lines = text.split("\n")
    if len(lines) > LINES:
        half = LINES // 2
        text = "\n".join([*lines[:half], f"[... {len(lines) - LINES + 1} lines ...]", *lines[len(lines) - half + 1 :]])
    if len(text) > CHARACTERS:
        half = CHARACTERS // 2 - 20
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(name: object, valid: Iterable[object]) -> str:
    """A hint to append to an error message: the valid name closest to `name`, or all of them when none is close."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name)[:LONGEST_NAME], [n for n in names if len(n) <= LONGEST_NAME], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The names with commas between them; of more than MOST_NAMES the first ones, of a long name its beginning."""
    shown = [n if len(n) <= LONGEST_NAME else f"{n[:LONGEST_NAME]}..." for n in names[:MOST_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
