import re

import experiments
import html5lib
import html_validator
import numpy as np
import pandas as pd
import pytest
import synthetic_evidence as rich
from synthetic_scores import STAGES, STEPS, make_scores

from vdjax.drift import evidence, figures, gaps, report, sections, summary
from vdjax.drift.evidence import Evidence
from vdjax.drift.scores import StageInfo
from vdjax.drift.statistics import analyse

NO_TRAINING = pd.DataFrame(columns=["stage", "step", "metric", "value"])
EVIL = "<script>alert('x')</script>&\"$\\frac{</td>"


class Page:
    """A page as html5lib's strict parser sees it, which fails at the first thing that the standard calls an error."""

    def __init__(self, html):
        root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
        self.elements = [e for e in root.iter() if isinstance(e.tag, str)]
        self.tags = [e.tag for e in self.elements]
        self.links = [v for e in self.elements for k, v in e.attrib.items() if k in ("src", "href", "srcset", "action")]
        self.ids = [e.attrib["id"] for e in self.elements if "id" in e.attrib]
        self.text = " ".join("".join(root.itertext()).split())

    def check(self):
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in self.links)
        assert {link[1:] for link in self.links if link.startswith("#")} <= set(self.ids)
        assert len(self.ids) == len(set(self.ids))
        images = [e.attrib for e in self.elements if e.tag == "img"]
        assert all(e["alt"] for e in images) and len({e["alt"] for e in images}) == len(images)
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        assert not [k for e in self.elements for k in e.attrib if k.startswith("on")]
        return self


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "RESAMPLES", 499)
        patch.setattr(report, "PERMUTATIONS", 2047)
        patch.setattr(figures, "DPI", 40)
        yield


def training_curves():
    rows = [(s.name, step, "loss", 1 / (1 + step)) for s in STAGES for step in range(0, s.total_steps, 10)]
    rows += [("dpo_hh", step, "eval_reward_accuracy", 0.5) for step in (0, 60)]
    return pd.DataFrame(rows, columns=["stage", "step", "metric", "value"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    scores = make_scores({("sft", "beta"): 0.2, ("dpo_support", "beta"): -0.1})
    facts = {
        "title": "A study", "model": "tiny", "parameters": 134515008, "seed": 3, "command": "python -m vdjax.main",
        "versions": {"jax": "0.10"}, "config": "stages = ('sft',)", "device": "cpu",
        "data": [{"stage": "sft", "source": "hh-rlhf", "examples": 12345, "dropped": {"prompts differ": 7}}],
        "probes": {"name": "built-in", "directions": {"beta": "support means more beta"}},
    }  # fmt: skip
    analysis = report.write(workdir, scores, STAGES, training_curves(), facts)
    return workdir, scores, facts, analysis


def test_files_are_written_and_nothing_is_left_over(run):
    workdir, *_ = run
    files = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert files == {
        "drift/stances.csv", "drift/drift.csv", "drift/stages.csv", "drift/distances.csv", "drift/robustness.csv",
        "drift/consistency.csv", "report.html",
        "figures/trajectories-1.png", "figures/drift-1.png", "figures/training-1.png",
    }  # fmt: skip
    assert all((workdir / f).read_bytes().startswith(b"\x89PNG") for f in files if f.endswith("png"))


def test_csv_files_read_back(run):
    workdir, _, _, analysis = run
    drift = pd.read_csv(workdir / "drift" / "drift.csv")
    assert list(drift.columns) == list(analysis.drift.columns)
    np.testing.assert_allclose(drift["magnitude"], analysis.drift["magnitude"], rtol=1e-5, atol=1e-12)
    assert drift["significant"].dtype == bool
    lines = (workdir / "drift" / "drift.csv").read_text().splitlines()
    undefined = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))  # sft, alpha, support: did not move
    assert undefined["significant"] == "False" and undefined["drift_time"] == "" and undefined["drift_time_high"] == ""
    assert len(pd.read_csv(workdir / "drift" / "stances.csv")) == len(analysis.stances)


def test_report_is_one_well_formed_file_without_network(run):
    html = (run[0] / "report.html").read_text()
    page = Page(html).check()
    assert page.tags.count("img") == 3
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_report_says_what_happened(run):
    workdir, scores, _, analysis = run
    text = Page((workdir / "report.html").read_text()).text
    assert "3 significant (noise not measured), 5 not significant, of 8 comparisons" in text  # support, neutral, graded
    assert "No topic’s change can be told from noise" in text  # dpo_hh
    assert "floor not measured" in text and "--config.seeds=[0,1,2]" in text
    support = analysis.drift.query("stage == 'sft' and topic == 'beta' and stance == 'support'").iloc[0]
    assert f"beta support {support['magnitude']:+.3f}" in text.replace("betasupport", "beta support")
    for fact in (
        "134,515,008",
        "12,345",
        "prompts differ: 7",
        "support means more beta",
        "jax 0.10",
        "python -m vdjax.main",
    ):
        assert fact in text
    assert scores["input"].iloc[0].startswith("Question 0 about alpha")
    assert re.search(r"Question \d about beta, \d\?", text)  # a most moved probe
    assert "forced choice" in text and "second training run" in text and "Not audited" in text


def test_same_input_same_files(run, tmp_path):
    workdir, scores, facts, _ = run
    report.write(tmp_path, scores, STAGES, training_curves(), facts)
    for name in ("report.html", "drift/drift.csv", "drift/stances.csv", "figures/trajectories-1.png"):
        assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes(), name


def test_text_of_others_is_escaped_everywhere(tmp_path):
    stages = [StageInfo(EVIL, EVIL, 10, None), StageInfo("dpo", "dpo", 10, EVIL)]
    steps = {EVIL: [0, 10], "dpo": [0, 10]}
    scores = make_scores({(EVIL, EVIL): 0.2}, [EVIL], stages=stages, steps=steps)
    scores["input"] = EVIL
    facts = {
        "title": EVIL, "command": EVIL, "config": EVIL, EVIL: {EVIL: [EVIL]},
        "data": [{"stage": EVIL, "source": EVIL, "examples": 1, "dropped": {EVIL: 1}}],
        "probes": {EVIL: EVIL, "directions": {EVIL: EVIL}},
    }  # fmt: skip
    training = pd.DataFrame([(EVIL, 0, "loss", 1.0)], columns=["stage", "step", "metric", "value"])
    report.write(tmp_path, scores, stages, training, facts)
    html = (tmp_path / "report.html").read_text()
    page = Page(html).check()
    assert "<script" not in html.lower()
    assert page.text.count(EVIL) > 15


def test_a_second_report_replaces_what_the_first_left(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_TOPICS", 2)
    stages = [StageInfo("dpo", "dpo", 60, None)]
    report.write(tmp_path, make_scores(propositions=2, stages=stages, steps={"dpo": [0, 60]}), stages, NO_TRAINING, {})
    assert (tmp_path / "figures" / "trajectories-2.png").exists() and (tmp_path / "drift" / "distances.csv").exists()
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    fewer = make_scores(topics=["alpha"], propositions=2, stages=stages, steps={"dpo": [0]})
    report.write(tmp_path, fewer, stages, NO_TRAINING, {})
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"trajectories-1.png", "mine.png"}
    assert not (tmp_path / "drift" / "distances.csv").exists()


@pytest.mark.parametrize("steps", [[0], [0, 10]])
def test_a_report_can_be_written_from_little(tmp_path, steps):
    stages = [StageInfo("models", "published", steps[-1], None)]
    scores = make_scores(topics=["alpha"], propositions=1, stages=stages, steps={"models": steps})
    scores = scores.drop(columns="input")
    found = report.write(tmp_path, scores, stages, NO_TRAINING, {})
    text = Page((tmp_path / "report.html").read_text()).text
    assert ("fewer than two propositions" in text) == (len(steps) == 2)
    assert ("no drift to report" in report.summary_table(found.drift)) == (len(steps) == 1)


def test_summary_table_is_short_and_names_the_largest_movers(run):
    lines = report.summary_table(run[3].drift).splitlines()
    assert re.match(r"sft +3/8 +beta +(support|neutral) +[+-]0\.[12]", lines[1])
    stages = [StageInfo(f"stage {i} " + "x" * 40, "dpo", 60, None) for i in range(25)]
    steps = {s.name: STEPS["dpo_hh"] for s in stages}
    drift = analyse(
        make_scores(topics=["t" * 50], propositions=2, stages=stages, steps=steps),
        stages,
        resamples=99,
        permutations=99,
    ).drift
    lines = report.summary_table(drift).splitlines()
    assert len(lines) <= 21 and max(map(len, lines)) <= 140
    assert "7 more stages" in lines[-2]


def test_moved_probes_are_the_most_moved_ones_as_asked():
    scores = make_scores({("sft", "beta"): 0.05}, noise=0)
    moved = (scores["probe_id"] == "alpha/3/2") & (scores["stage"] == "sft") & (scores["step"] == 100)
    scores.loc[moved, ["support", "neutral", "oppose"]] = [0.0, 0.1, 0.9]
    probes = summary.moved_probes(scores, "sft", count=3)
    assert probes[0]["question"] == "Question 2 about alpha, 3?" and probes[0]["polarity"] == "−"
    assert probes[0]["after"] == {"support": 0.0, "neutral": 0.1, "oppose": 0.9}
    assert [p["topic"] for p in probes[1:]] == ["beta", "beta"]
    np.testing.assert_allclose([p["change"] for p in probes[1:]], 0.05)


def test_caveats_are_found_in_the_data():
    scores = make_scores(topics=["alpha", "beta"], propositions=4)
    scores.loc[scores["topic"] == "beta", "polarity"] = 0
    scores = scores[
        ~((scores["topic"] == "alpha") & ((scores["polarity"] == -1) | (scores["probe_id"] == "alpha/0/0")))
    ]
    text = " ".join(summary.caveats(scores, analyse(scores, STAGES, resamples=99, permutations=99), 99))
    assert "16 of 23 probes have unknown polarity" in text
    assert "one direction only: alpha." in text and "second training run" in text
    assert "4 to 4 propositions" in text and "smallest p-value the test can give is 0.12" in text
    assert "out of reach" in text and "at least 45 comparisons" in text  # 2 / 2**4 * 18 / 0.05
    assert "different numbers of probes" in text
    assert "forced choice" in text


def test_real_drifts_come_before_significant_ones_and_those_before_larger_ones_that_are_not():
    drift = pd.DataFrame(
        {
            "topic": ["alpha", "beta", "gamma", "all", "delta", "epsilon", "zeta"],
            "stance": ["support"] * 6 + ["graded"],
            "magnitude": [0.5, -0.2, 0.1, 0.9, -0.3, 0.4, 0.3],
            "significant": [False, True, True, True, False, True, True],
            "floor": [0.1, 0.1, np.nan, 0.1, 0.1, 0.6, 0.1],
            "real": [False, True, None, True, False, False, True],
        }
    )
    rows = summary.by_importance(drift)
    assert rows["topic"].tolist() == ["beta", "zeta", "gamma", "epsilon", "alpha", "delta"]
    verdicts = [summary.verdict(row) for row in rows.to_dict("records")]
    assert verdicts == ["real", "real", "significant", "within noise", "not significant", "not significant"]


def test_how_each_stage_ended(run):
    """Held-out values go before training ones; a stage without probes has no drift."""
    _, _, _, analysis = run
    rows = [("sft", step, "loss", float(step)) for step in range(1, 11)]
    rows += [("rm", 4, "loss", 0.7), ("rm", 0, "eval_loss", 0.9), ("rm", 4, "eval_loss", 0.6), ("rm", 4, "kl", 2.0)]
    training = pd.DataFrame(rows, columns=["stage", "step", "metric", "value"])
    stages = [STAGES[0], StageInfo("rm", "reward_model", 4, None)]
    sft, rm = summary.outcomes(training, analysis.drift, stages).to_dict("records")
    assert sft["loss"] == 8.0  # the mean of 6 to 10
    assert (sft["largest_topic"], sft["objective"]) == ("beta", STAGES[0].objective)
    drift = analysis.drift[(analysis.drift["stage"] == "sft") & (analysis.drift["topic"] != "all")]
    assert abs(sft["largest_magnitude"]) == drift["magnitude"].abs().max()
    assert (rm["loss"], rm["kl_response"]) == (0.6, 2.0)
    assert pd.isna(rm["largest_topic"]) and pd.isna(rm["kl"])
    tables = {"stages": summary.outcomes(training, analysis.drift, stages)}
    page = report.render(make_scores({}), stages, analysis, tables, {}, {}, Evidence())
    assert "not probed" in page and "nan" not in Page(page).text.lower()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Two readouts, two judges, an audit: everything a report can show."""
    workdir = tmp_path_factory.mktemp("full")
    scores, found = rich.make_evidence(propositions=4)
    analysis = report.write(workdir, scores, rich.STAGES, NO_TRAINING, {"seed": 1}, found)
    return workdir, scores, found, analysis


def test_every_table_and_figure_of_a_full_run(full):
    workdir, _, _, analysis = full
    assert {p.stem for p in (workdir / "drift").iterdir()} == set(report.TABLES)
    names = [f"{kind}{readout}" for kind in ("trajectories", "drift") for readout in ("", *JUDGED)]
    assert {p.stem for p in (workdir / "figures").iterdir()} == {f"{n}-1" for n in [*names, "readouts", "rates"]}
    assert len(pd.read_csv(workdir / "drift" / "floors.csv")) == len(analysis.floors) > 0
    page = Page((workdir / "report.html").read_text()).check()
    assert page.tags.count("img") == 9
    for text in (
        "Measured by statement, the first of 3 readouts",
        "right on 81% of 400 unseen",
        "its quality was not measured",
        "they agree on",
        "value gap +0.300",
        "mean stance +0.300",
        "Jensen–Shannon",
        "What the data predict",
        "off-topic",
    ):
        assert text in page.text, text
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_distances_are_bold_by_q_and_not_by_p(full):
    workdir, scores, found, analysis = full
    readout = analysis.distances["readout"].iloc[0]
    table = analysis.distances.assign(js_p_value=0.04, tv_p_value=0.04, js_q_value=0.06)
    first = (table["readout"] == readout) & (table["topic"] == rich.TOPICS[0]) & (table["stage"] == "sft")
    table.loc[first, "js_q_value"] = 0.04
    tables = report.all_tables(scores, rich.STAGES, NO_TRAINING, analysis, found)
    page = report.render(scores, rich.STAGES, analysis._replace(distances=table), tables, {}, {}, found)
    section = page.split('id="distances"')[1].split("<details")[0]
    assert section.count("<b>") == 1 and section.count("q 0.060") == 2 * 4 - 1
    assert "Bold where q" in section


def test_the_html_checker_finds_no_fault(full, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<!doctype html><title>x</title><p id=a>x</p><p id=a align=left style='foo: 1'>y</p>")
    assert len(html_validator.faults(wrong)) >= 3
    assert html_validator.faults(full[0] / "report.html") == []


JUDGED = ("-open_ended_stance_135m", "-open_ended_gpt_votes")


def test_the_data_are_set_against_the_drift_of_this_report(full):
    """Not against that of the time of the audit: the join is made again, in the page and in audit/."""
    workdir, _, _, analysis = full
    joined = pd.read_csv(workdir / "audit" / "against_drift.csv")
    graded = analysis.drift.query("stance == 'graded' and readout == 'statement' and topic != 'all'")
    both = joined.merge(graded, on=["stage", "topic"])
    assert len(both) == len(joined) == len(graded) > 0
    np.testing.assert_allclose(both["drift"], both["magnitude"])
    found = gaps.agreement(joined)
    text = Page((workdir / "report.html").read_text()).text
    assert f"{found['agree']} of {found['n']} in all" in text and found["n"] == len(joined)
    assert (workdir / "audit" / "gap_against_drift.png").exists()


def test_the_headline_links_to_the_responses_of_its_topic(full):
    """The link beside a mover leads to a proposition of the same topic."""
    page = (full[0] / "report.html").read_text()
    rows = re.findall(r'<td><b>([^<]+)</b>(?:(?!<tr).)*?href="#(responses-\d-\d)"', page, re.DOTALL)
    assert len(rows) == 6
    for topic, anchor in rows:
        assert re.search(rf'id="{anchor}"[^>]*><summary>{re.escape(topic)}: “measure \d on {re.escape(topic)}”', page)


def test_pairs_have_the_same_seed_and_the_verdicts_of_their_own_snapshot(full):
    _, scores, found, _ = full
    items = evidence.generations(scores, found.responses, "sft", [rich.TOPICS[0]], each=1)
    said = found.responses[(found.responses["stage"] == "sft") & (found.responses["replicate"] == 0)]
    changes = []
    for pair in items[0]["pairs"]:
        own = said[(said["probe_id"] == pair["probe_id"]) & (said["sample"] == pair["sample"])]
        for side, step in (("before", 0), ("after", 100)):
            rows = own[own["step"] == step]
            assert set(rows["seed"]) == {pair["seed"]} and set(rows["response"]) == {pair[side]["text"]}
            verdicts = {judge: (label, p) for judge, label, p in pair[side]["verdicts"]}
            for row in rows.dropna(subset="judge").to_dict("records"):
                label, p = verdicts[row["judge"]]
                assert p == row[label] == max(row[name] for name in rich.QUANTITIES[:5])
        changes.append(pair["change"])
    assert changes == sorted(changes, reverse=True) and items[0]["count"] == 4  # 2 probes x 2 samples


def test_the_most_moved_propositions_by_brute_force(full):
    _, scores, found, _ = full
    rows = scores[(scores["stage"] == "dpo") & scores["readout"].str.startswith("open") & (scores["replicate"] == 0)]
    moved = {}
    for proposition, group in rows[rows["topic"] == rich.TOPICS[0]].groupby("proposition"):
        ends = []
        for step in (0, 60):
            total = np.zeros(6)
            at = group[group["step"] == step]
            for row in at.to_dict("records"):
                p = np.array([row[name] for name in rich.QUANTITIES])
                total += p if row["polarity"] == 1 else p[[2, 1, 0, 3, 4, 5]]
            ends.append(total / len(at))
        moved[proposition] = abs(ends[1] - ends[0]).sum() / 2
    items = evidence.generations(scores, found.responses, "dpo", [rich.TOPICS[0]], each=2)
    best = sorted(moved, key=moved.get, reverse=True)[:2]
    assert [item["proposition"] for item in items] == best
    np.testing.assert_allclose([item["change"] for item in items], [moved[name] for name in best])


def test_rates_are_those_of_the_scores(full):
    _, scores, _, analysis = full
    rows = {(row["readout"], row["stage"]): row for row in evidence.rates(scores)}
    table = analysis.stances.query("stage == 'dpo' and step == 60 and topic == 'all' and stance == 'refusal'")
    judged = table[table["readout"] == "open_ended:gpt-votes"]["value"].item()
    assert rows["open_ended:gpt-votes", "dpo"]["after"]["refusal"] == pytest.approx(judged)
    assert len(rows) == 4


def test_hostile_text_in_responses_verdicts_and_audit(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    stages = [StageInfo("dpo", "dpo", 10, None)]
    scores, found = rich.make_evidence([EVIL], stages, {"dpo": (0, 10)}, propositions=2, replicates=1)
    found.responses["response"] = EVIL + "\n\n  indented" + " word" * 200
    found.responses["system_prompt"] = found.responses["question"] = EVIL
    found.responses["judge"] = found.responses["judge"].replace(rich.JUDGES[0], EVIL)
    judges = ({"name": EVIL, "kind": EVIL, "path": EVIL, "hash": EVIL},)
    report.write(tmp_path, scores, stages, NO_TRAINING, {}, found._replace(judges=judges))
    html = (tmp_path / "report.html").read_text()
    page = Page(html).check()
    assert "<script" not in html.lower() and page.text.count(EVIL) > 30
    assert "\n\n  indented" in html  # whitespace is kept


def test_a_run_without_stances_or_verdicts(tmp_path):
    """Every response degenerate: no judge, no graded stance; the report says so and stands."""
    stages = [StageInfo("dpo", "dpo", 10, None)]
    scores, found = rich.make_evidence(["alpha"], stages, {"dpo": (0, 10)}, propositions=2, replicates=1)
    scores = scores[scores["readout"] != "statement"].copy()
    scores[list(rich.QUANTITIES)] = [0, 0, 0, 0, 0, 1]
    scores["graded"] = np.nan
    responses = found.responses.assign(degenerate="empty", response="", judge=None).drop_duplicates(
        ["step", "probe_id", "variant", "sample", "replicate"]
    )
    report.write(tmp_path, scores, stages, NO_TRAINING, {}, Evidence(responses, found.judgements.iloc[:0]))
    page = Page((tmp_path / "report.html").read_text()).check()
    assert "degenerate (empty), not judged" in page.text and "(empty)" in page.text
    assert "nan" not in page.text.lower()


def test_names_of_figures_do_not_meet():
    readouts = ["statement", "open_ended:a b", "open_ended:a-b", "1", "../x"]
    stems = [figures.stem("drift", readouts, i) for i in range(5)]
    assert stems == ["drift", "drift-open_ended_a_b", "drift-open_ended_a_b_2", "drift-1_3", "drift-x"]


def test_agreement_in_words(full):
    table = pd.read_csv(full[0] / "drift" / "agreement.csv")
    share = table.query("measure == 'percent'")["value"].item()
    kappa = table.query("measure == 'cohen_kappa'")["value"].item()
    assert sections.agreed(table) == f"they agree on {100 * share:.0f}% of the responses, κ {kappa:.2f}"
    assert sections.agreed(table.iloc[:0]) == ""


def test_missing_noise_is_named_with_the_line_that_measures_it(full):
    floors = full[3].floors
    assert [how for _, how in sections.missing_floors(floors, ["open_ended:a"])] == [
        "judges.NAME.repeats = 2", "--config.seeds=[0,1,2]",
    ]  # fmt: skip
    assert [how for _, how in sections.missing_floors(floors.iloc[:0], ["statement"])] == ["--config.seeds=[0,1,2]"]


def test_a_judge_without_noise_is_not_to_be_repeated(full, tmp_path, monkeypatch):
    """A trained judge shows no options to reorder; `repeats` of it is refused."""
    trained, people = {"name": "mine", "noiseless": True}, {"name": "anna", "kind": "human"}
    other = {"name": "api", "kind": "api"}

    def how(*judges):
        return [how for _, how in sections.missing_floors(full[3].floors.iloc[:0], ["open_ended:a"], judges)]

    rest = ["probes.replicates = 2", "--config.seeds=[0,1,2]"]
    assert how(trained) == how(trained, people) == rest
    assert how() == how(trained, other) == [rest[0], "judges.NAME.repeats = 2", rest[1]]
    experiments.leave_out(monkeypatch.setattr)
    scores, found = rich.make_evidence()
    for judges, said in ((({**found.judges[0], **trained},), True), (found.judges, False)):
        report.write(tmp_path, scores, rich.STAGES, NO_TRAINING, {}, found._replace(judges=judges))
        page = (tmp_path / "report.html").read_text()
        assert ("The own noise of mine is 0 by construction" in page) == said
        assert ("judges.NAME.repeats = 2" in page) != said


def test_what_only_all_topics_together_show_is_in_the_headline():
    """Four propositions a topic cannot be significant; twelve together can."""
    scores, _ = rich.make_evidence(propositions=4, replicates=1)
    found = analyse(scores, rich.STAGES, resamples=99, permutations=4095)
    for row in summary.stage_rows(found, rich.STAGES):
        assert row["moved"] == 0 and row["movers"][0]["topic"] == "all" and row["movers"][0]["verdict"] == "significant"
        assert [mover["verdict"] for mover in row["movers"][1:]] == ["not significant"] * 3
