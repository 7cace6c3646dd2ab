"""configs/studies/smoke.py as its user runs it, its report and tables. Takes minutes: runs with VDJAX_SLOW=1 alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import html5lib
import numpy as np
import pandas as pd
import pytest
import tiny
from test_study_report import latex_errors

from vdjax.drift.tensorboard import png_size

ROOT = tiny.HERE.parent
pytestmark = tiny.SLOW
TRUNKS = [f"tiny-smoke-seed-{seed}" for seed in (0, 1)]
CELLS = {("sft", "")} | {(o, data) for o in ("dpo", "simpo") for data in ("first", "second")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("smoke_study")
    command = [sys.executable, "-m", "vdjax.study", "--config", "configs/studies/smoke.py", "--workdir", str(workdir)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def test_every_cell_has_its_number_with_an_interval(ran: Path) -> None:
    table = pd.read_csv(ran / "tables" / "drift.csv", keep_default_na=False, na_values=["", "nan"])
    table["preference"] = table["preference"].fillna("")
    assert set(zip(table["objective"], table["preference"], strict=True)) == CELLS
    assert (table["seeds"] == 2).all() and set(table["ci_over"]) == {"seeds"}
    assert (table["ci_low"] <= table["magnitude"]).all() and (table["magnitude"] <= table["ci_high"]).all()
    own = [pd.read_csv(ran / trunk / "drift" / "drift.csv").assign(trunk=trunk) for trunk in TRUNKS]
    means = pd.concat(own).groupby(["readout", "stage", "topic", "stance"])["magnitude"].mean()
    stages = table["objective"] + np.where(table["preference"] == "", "", "_" + table["preference"])
    expected = [means[key] for key in zip(table["readout"], stages, table["topic"], table["stance"], strict=True)]
    np.testing.assert_allclose(table["magnitude"], expected, atol=2e-6)


def test_tables_are_there_in_three_formats(ran: Path) -> None:
    for name in ("summary", "magnitude", "time"):
        table = pd.read_csv(ran / "tables" / f"{name}.csv", dtype=str)
        assert len(table) and "algorithm" in table and "preference data" in table
        markdown = (ran / "tables" / f"{name}.md").read_text().splitlines()
        assert sum(line.startswith("| ") for line in markdown) == len(table) + 2
        latex = (ran / "tables" / f"{name}.tex").read_text()
        assert latex_errors(latex) == [] and latex.count(r"\\") > len(table)


def test_the_merged_report_is_whole(ran: Path) -> None:
    page = (ran / "report.html").read_text()
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    pictures = list((ran / "figures").glob("*.png"))
    images = list(tree.iter("img"))
    assert len(images) == len(pictures) > 3 and all(image.get("alt") for image in images)
    assert all(min(png_size(picture.read_bytes())) > 200 for picture in pictures)
    links = {link.get("href", "") for link in tree.iter("a")}
    assert {link for link in links if not link.startswith("#")} == {f"{trunk}/report.html" for trunk in TRUNKS}
    assert {link[1:] for link in links if link.startswith("#")} <= {e.get("id") for e in tree.iter() if e.get("id")}
    for trunk in TRUNKS:
        html5lib.HTMLParser(strict=True).parse((ran / trunk / "report.html").read_text())
    assert "Not finished" not in page and "nan" not in "".join(tree.itertext()).lower()


def test_the_merged_report_opens_in_a_browser(ran: Path, tmp_path: Path) -> None:
    seen = browser.look(tmp_path, lambda folder, _: shutil.copy(ran / "report.html", folder))
    for width in (400, 1200):
        page = seen.pages["report.html", width]
        assert page["broken"] == page["dead"] == page["scripts"] == 0
        assert page["wide"] == [] and page["overflow"] <= 0
    assert seen.asked == ["/control.png"] and all("control" in line for line in seen.console)
