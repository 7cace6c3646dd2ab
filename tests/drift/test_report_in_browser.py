"""The report in headless Chromium: text of others does nothing, nothing is fetched, nothing is wider than the page."""

import browser
import pandas as pd
import pytest
from synthetic_evidence import make_evidence

from vdjax.drift import figures, report
from vdjax.drift.scores import StageInfo

EVIL = "<script>document.title='pwned'</script></td></table><img src=SERVER/evil.png> **bold** `code` $x$"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a browser makes of a report full of hostile text, at two widths, and of a page with faults."""
    return browser.look(tmp_path_factory.mktemp("browser"), write_report)


def write_report(folder, server):
    evil = EVIL.replace("SERVER", server)
    stages = [StageInfo(evil, "dpo", 10, None)]
    scores, evidence = make_evidence([evil, "x" * 90], stages, {evil: (0, 10)}, propositions=3, replicates=1)
    evidence.responses["response"] += "\n  " + evil + " " + "w" * 300 + " word" * 100
    facts = {
        "title": "calm",
        "command": evil,
        "config": "--config.x=" + "y" * 300,
        "data": [{"stage": evil, "source": evil}],
    }
    training = pd.DataFrame([(evil, i, "loss", 1.0) for i in range(3)], columns=["stage", "step", "metric", "value"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "RESAMPLES", 99)
        patch.setattr(report, "PERMUTATIONS", 99)
        patch.setattr(figures, "DPI", 40)
        report.write(folder, scores, stages, training, facts, evidence)


def test_the_browser_would_notice(seen):
    pages, asked, console = seen
    control = pages["control.html", 400]
    assert control["title"] == "pwned" and control["scripts"] == 1 and control["broken"] == 1
    assert control["overflow"] > 2000 and len(control["wide"]) == 1
    assert "/control.png" in asked and any("control" in line for line in console)


@pytest.mark.parametrize("width", [400, 1200])
def test_hostile_text_is_only_text(seen, width):
    pages, asked, console = seen
    page = pages["report.html", width]
    assert page["title"] == "calm" and page["scripts"] == 0
    assert page["text"].count("<script>document.title='pwned'</script></td></table><img src=") > 20
    assert page["text"].count("**bold** `code` $x$") > 20
    assert set(asked) == {"/control.png"}
    assert all("control" in line for line in console)


@pytest.mark.parametrize("width", [400, 1200])
def test_everything_is_there_and_fits(seen, width):
    page = seen[0]["report.html", width]
    assert page["broken"] == 0 and page["dead"] == 0 and page["links"] > 14 and page["outside"] == []
    assert len(page["alts"]) > 2 and all(page["alts"])
    assert page["wide"] == [] and page["overflow"] <= 0
