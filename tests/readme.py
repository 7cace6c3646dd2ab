"""Runs what the README shows: python readme.py README.md, in a directory that holds what its first command leaves.

Fenced blocks marked `python` are run in order, in one namespace; those marked `bash run` by bash where they stand.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```(\w+)( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    run: bool
    text: str
    line: int  # of its first line


def blocks(text: str) -> list[Block]:
    return [Block(m[1], bool(m[2]), m[3], text[: m.start(3)].count("\n") + 1) for m in BLOCK.finditer(text)]


def run(file: Path) -> None:
    """Runs the blocks in the working directory; an exception's traceback names lines of the README."""
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks(file.read_text(encoding="utf-8")):
        if block.language == "python":
            print(f"README line {block.line}: python", flush=True)
            exec(compile("\n" * (block.line - 1) + block.text, str(file), "exec"), namespace)
        elif block.language == "bash" and block.run:
            print(f"README line {block.line}: bash", flush=True)
            subprocess.run(["bash", "-e", "-c", block.text], check=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
