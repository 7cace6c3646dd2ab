"""The merged report of a study in headless Chromium: text of others does nothing, nothing is fetched, all fits."""

import browser
import pandas as pd
import pytest
import test_study_report as made

from vdjax.drift import figures
from vdjax.studies import merge, page

EVIL = "<script>document.title='pwned'</script></td></table><img src=SERVER/evil.png> **bold** `code` $x$"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return browser.look(tmp_path_factory.mktemp("browser"), write_report)


def write_report(folder, server):
    evil = EVIL.replace("SERVER", server)
    cells = made.study_cells((0, 1), ("a",))
    made.write_study(folder, cells, gaps=True, readouts=made.READOUTS[:1])
    for table in folder.glob("*/*/*.csv"):  # topics are the probes', names of trunks the study's own
        frame = pd.read_csv(table)
        frame.assign(topic=frame["topic"].replace("rain", evil)).to_csv(table, index=False)
    merged = merge.read(folder, list(dict.fromkeys(cell.trunk for cell in cells)), [evil], cells)
    for name in ("drift", "stances", "distances", "gaps"):
        getattr(merged, name)["preference"] = getattr(merged, name)["preference"].replace("uf", evil)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 40)
        (folder / "report.html").write_text(str(page.files(merged, cells, evil)["report.html"]))


@pytest.mark.parametrize("width", [400, 1200])
def test_hostile_text_is_only_text(seen, width):
    found = seen.pages["report.html", width]
    assert found["title"] == "Value drift: a study" and found["scripts"] == 0
    assert found["text"].count("<script>document.title='pwned'</script></td></table><img src=") > 20
    assert found["text"].count("**bold** `code` $x$") > 20
    assert set(seen.asked) == {"/control.png"}
    assert seen.console and all("control" in line for line in seen.console)


@pytest.mark.parametrize("width", [400, 1200])
def test_everything_is_there_and_fits(seen, width):
    found = seen.pages["report.html", width]
    assert found["broken"] == 0 and found["dead"] == 0 and found["links"] > 8
    assert found["outside"] == ["a-w-seed-0/report.html", "a-w-seed-1/report.html"]
    assert len(found["alts"]) == 5 == len(set(found["alts"])) and all(found["alts"])
    assert found["wide"] == [] and found["overflow"] <= 0
