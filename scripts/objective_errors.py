"""Prints the largest errors of every preference objective against its references: `python scripts/objective_errors.py`.

The table stands in docs/objectives.md; what is compared with what is in tests/objectives/references.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "objectives"))

import references  # noqa: E402


def main() -> None:
    print("| objective | cases | loss, TRL | gradient, TRL | loss, formula | gradient, formula |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rows in references.table().items():
        cells = [f"{x:.0e}" for x in rows["formula"][1:]]
        cells = [f"{x:.0e}" for x in rows["TRL 1.16"][1:]] + cells if "TRL 1.16" in rows else ["", "", *cells]
        print(f"| `{name}` | {rows['formula'][0]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
