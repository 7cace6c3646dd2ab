"""The merged report of a study, from tables with known numbers."""

import re
from pathlib import Path
from typing import Any

import html5lib
import html_validator
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vdjax.drift import figures as drift_figures
from vdjax.drift import gaps
from vdjax.drift.tensorboard import png_size
from vdjax.errors import UserError
from vdjax.studies import figures, merge, page, tables
from vdjax.studies.grid import Cell
from vdjax.studies.merge import Merged

TOPICS = ("all", "tea_1 & <b>", "rain")
STANCES = ("support", "neutral", "oppose", "graded")
READOUTS = ("open_ended:j|1", "statement")
TIMES = ("drift_time", "drift_time_low", "drift_time_high", "drift_time_paired")
DRIFTS = {"dpo": 0.2, "simpo": -0.1, "sft": 0.05}


def study_cells(seeds: tuple[int, ...] = (0, 1, 2), models: tuple[str, ...] = ("a", "b")) -> list[Cell]:
    return [
        Cell(model, "w", objective, preference, seed, f"{model}-w-seed-{seed}", f"{objective}_{preference}".strip("_"))
        for seed in seeds
        for model in models
        for objective, preference in (("sft", ""), ("dpo", "hh"), ("simpo", "hh"), ("dpo", "uf"), ("simpo", "uf"))
    ]


def drift_of(cell: Cell, topic: str, stance: str) -> float:
    """Of seed s: 1 + s / 10 times what the objective does; the pooled topic moves by half of it."""
    size = {"support": 1.0, "oppose": -1.0, "neutral": 0.0, "graded": 2.0}[stance]
    return DRIFTS[cell.objective] * (1 + cell.seed / 10) * size * (0.5 if topic == "all" else 1)


def write_study(
    workdir: Path,
    cells: list[Cell],
    floor: float = np.nan,
    gaps: bool = False,
    readouts: tuple[str, ...] = READOUTS,
) -> None:
    for trunk in {cell.trunk for cell in cells}:
        own = [cell for cell in cells if cell.trunk == trunk]
        moves, values = [], []
        for readout in readouts:
            for cell in own:
                for topic in TOPICS:
                    for stance in STANCES:
                        size = drift_of(cell, topic, stance)
                        sure = cell.objective == "dpo" and stance == "support"
                        keys = {"readout": readout, "stage": cell.stage, "topic": topic, "stance": stance}
                        times = dict(zip(TIMES, (0.5, 0.2, 0.8, 0.7 + cell.seed / 10), strict=True)) if sure else {}
                        moves.append(keys | {"magnitude": size, "ci_low": size - 0.03, "ci_high": size + 0.04,
                                             "significant": sure, "floor": floor,
                                             "n_propositions": 8 + 4 * (topic == "all"),
                                             "real": sure and abs(size) > floor, **times})  # fmt: skip
                        values += [keys | {"step": step, "value": 0.3 + size * step / 10,
                                           "ci_low": 0.2, "ci_high": 0.9} for step in (0, 5, 10)]  # fmt: skip
        # An experiment's tables also hold its pretraining, which is no cell.
        moves.append(moves[0] | {"stage": "pretrain"})
        folder = workdir / trunk / "drift"
        folder.mkdir(parents=True)
        pd.DataFrame(moves).to_csv(folder / "drift.csv", index=False)
        pd.DataFrame(values).to_csv(folder / "stances.csv", index=False)
        apart = [{"readout": r, "stage": c.stage, "topic": t, "js": 0.1 + c.seed}
                 for r in READOUTS for c in own for t in TOPICS]  # fmt: skip
        pd.DataFrame(apart).to_csv(folder / "distances.csv", index=False)
        if gaps:
            rows = [{"stage": c.stage, "topic": t, "gap": 0.3 + i, "gap_low": 0.2, "gap_high": 0.4,
                     "side": "chosen - rejected" if c.preference else "sft"}
                    for c in own for i, t in enumerate(TOPICS[1:])]  # fmt: skip
            (workdir / trunk / "audit").mkdir()
            pd.DataFrame(rows).to_csv(workdir / trunk / "audit" / "against_drift.csv", index=False)


def merged_of(workdir: Path, cells: list[Cell], **how: Any) -> Merged:
    write_study(workdir, cells, **how)
    return merge.read(workdir, list(dict.fromkeys(cell.trunk for cell in cells)), ["c-w-seed-0"], cells)


def at(table: pd.DataFrame, **keys: str) -> pd.Series:
    rows = table[(table[list(keys)] == list(keys.values())).all(axis=1)]
    assert len(rows) == 1
    return rows.iloc[0]


CELL = {"model": "b", "objective": "dpo", "preference": "hh", "topic": "rain"}


def test_numbers_are_means_over_the_seeds(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells())
    means = merge.over_seeds(merged.drift)
    assert len(means) == 2 * 2 * 5 * 3 * 4
    assert list(means["readout"]) == sorted(means["readout"], key=READOUTS.index)
    row = at(means, readout="statement", stance="support", **CELL)
    assert (row["seeds"], row["significant"], row["timed"], row["floored"]) == (3, 3, 3, 0)
    np.testing.assert_allclose([row["magnitude"], row["low"], row["high"], row["drift_time"]], [0.22, 0.2, 0.24, 0.5])
    # Two topics beside the pooled one, each with the drifts .2, .22, .24: s = 0.02 with one topic's degrees of freedom.
    assert row["floor"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.02 / np.sqrt(3))
    assert at(means, readout="statement", stance="support", **{**CELL, "topic": "all"})["floor"] == pytest.approx(
        stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    )
    ends = at(merge.ends_over_seeds(merged.stances), readout="statement", stance="support", **CELL)
    np.testing.assert_allclose([ends["before"], ends["after"]], [0.3, 0.52])
    curves = merge.curves_over_seeds(merged.stances)
    middle = at(curves[curves["share"] == 0.5], readout="statement", stance="support", **CELL)
    np.testing.assert_allclose([middle["value"], middle["low"], middle["high"]], [0.41, 0.4, 0.42])


@pytest.mark.parametrize(
    ("seeds", "floor", "marks"),
    [
        ((0,), np.nan, "*"),  # nothing was measured that it could be beyond
        ((0,), 0.1, "**"),
        ((0,), 0.3, "*"),
        ((0, 1, 2), np.nan, "**"),  # beyond the noise of training
        ((0, 1, 2), 0.3, "*"),
        ((0, 60), np.nan, "*"),  # seeds as different as that: within it
    ],
)
def test_real_is_beyond_every_floor_that_was_measured(
    tmp_path: Path, seeds: tuple[int, ...], floor: float, marks: str
) -> None:
    merged = merged_of(tmp_path, study_cells(seeds), floor=floor)
    means = merge.over_seeds(merged.drift)
    rows = {stance: at(means, readout="statement", stance=stance, **CELL).to_dict() for stance in STANCES}
    assert tables.mark(rows["support"]) == marks
    assert tables.mark(rows["oppose"]) == ""
    means.loc[:, "significant"] = 0
    assert tables.mark(means.iloc[0].to_dict()) == ""


def test_seeds_that_move_in_two_directions_did_not_move(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells((0, 1)))
    drift = merged.drift.assign(significant=True)
    drift.loc[drift["seed"] == 1, "magnitude"] *= -0.5
    means = merge.over_seeds(drift)
    moved = means[means["magnitude"] != 0]
    assert len(moved) and (moved["significant"] == 1).all() and set(map(tables.mark, moved.to_dict("records"))) == {""}


def test_tables_in_three_formats(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells())
    made = tables.all_tables(merged)
    assert list(made) == ["summary", "magnitude", "time"]
    magnitude = made["magnitude"]
    assert list(magnitude.columns) == [
        *("readout", "model", "algorithm", "preference data", "topic", "seeds"), *STANCES,
    ]  # fmt: skip
    keys = {"readout": "statement", "model": "b", "algorithm": "dpo", "preference data": "hh", "topic": "tea_1 & <b>"}
    # +- t(0.975; 2) 0.02 / sqrt(3) = 0.0497
    assert at(magnitude, **keys)["support"] == "+0.220** [+0.170, +0.270] 3/3"
    assert at(magnitude, **keys)["oppose"] == "-0.220 [-0.270, -0.170] 0/3"
    time = at(made["time"], **keys)
    assert (time["support"], time["support, paired"]) == ("50% [50%, 50%]", "80% [70%, 90%]")
    assert (time["oppose"], time["oppose, paired"]) == ("–", "–")
    summary = at(made["summary"], **{k: v for k, v in keys.items() if k != "topic"})
    assert (summary["moved"], summary["real"]) == ("2 of 6", "2 of 6")
    assert summary["JS distance"] == "1.100"
    assert summary["mean |drift|"] == f"{0.22 * 2 / 3:.3f}"

    lines = tables.to_markdown(magnitude).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(magnitude.columns) + 1}
    assert r"open_ended:j\|1" in lines[2] and r"\*\*" in "".join(lines)
    latex = tables.to_latex(magnitude, "a_b < 5%", "tab:x")
    assert r"tea\_1 \& \textless{}b\textgreater{}" in latex and r"a\_b \textless{} 5\%" in latex
    assert "$+$0.220** [$+$0.170, $+$0.270] 3/3" in latex
    for text in ("+0.220** [+0.170, +0.270] 3/3", r"+0.220\*\* [+0.170, +0.270] 3/3"):
        assert text in (magnitude.to_csv(), tables.to_markdown(magnitude))["\\" in text]
    rows = [line for line in latex.splitlines() if "tea" in line]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(magnitude.columns) - 1}
    for rule in ("toprule", "midrule", "bottomrule"):
        assert rule in latex


def latex_errors(text: str) -> list[str]:
    """What LaTeX would stop at, or print as something else, in a table without commands of others."""
    errors = []
    bare = re.sub(r"\\(?:[&%$#_{}]|\\)", "", text)  # without \& and the like, and line ends
    begun: list[str] = []
    for which, name in re.findall(r"\\(begin|end)\{(\w+)\}", bare):
        if which == "begin":
            begun.append(name)
        elif not begun or begun.pop() != name:
            errors.append(f"\\end{{{name}}}")
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            errors.append("a brace too many")
    errors += begun + ["an open brace"] * depth
    math = re.sub(r"\$[+-]\$", "", bare)
    errors += re.findall(r"[$%#^~_<>|\"]|[^\x00-\x7f]", math)
    known = ("begin|end|caption|label|toprule|midrule|bottomrule|endfirsthead|endhead|endfoot|endlastfoot|multicolumn"
             "|text(?:backslash|asciitilde|asciicircum|less|greater|bar)")  # fmt: skip
    errors += [name for name in re.findall(r"\\([A-Za-z]*)", bare) if not re.fullmatch(known, name)]
    columns = re.findall(r"\\begin\{longtable\}\{(l+)\}", text)
    parts = {row: len(re.split(r"(?<!\\)&", row)) for row in text.splitlines()}
    return errors + [r for r, n in parts.items() if n > 1 and (n != len(columns[0]) or not r.endswith(r"\\"))]


@pytest.mark.parametrize("name", ["tea_1 & <b>", "\\input{x} $y^2$ ~ 5% #1 | \"q\" {", "a – b\\"])
def test_latex_tables_are_balanced_and_escaped_throughout(tmp_path: Path, name: str) -> None:
    merged = merged_of(tmp_path, [cell._replace(model=cell.model + name) for cell in study_cells((0, 1))])
    for table, formatted in tables.all_tables(merged).items():
        text = tables.to_latex(formatted.rename(columns={"topic": name}), page.CAPTIONS[table], f"tab:{table}")
        assert latex_errors(text) == [], table
        assert text.count(r"\toprule") == 2 and text.count("Continued on next page") == 1
    assert r"mean \textbar{}drift\textbar{}" in tables.to_latex(tables.all_tables(merged)["summary"], "", "x")


WRONG = ("a_b", "50%", "|drift|", "q < 0.05", "{", "}", r"\foo", "–", r"1 & 2 \\", r"\end{x}")


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_latex_finds_faults(wrong: str) -> None:
    whole = "\\begin{longtable}{lll}\na & b & c \\\\\n%s\n\\end{longtable}\n"
    assert latex_errors(whole % "x") == [] and latex_errors(whole % wrong) != []


def test_one_seed_has_the_intervals_of_its_own_experiment(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells((0,)))
    made = tables.all_tables(merged)
    keys = {"readout": "statement", "algorithm": "dpo", "model": "b", "preference data": "hh", "topic": "rain"}
    assert at(made["magnitude"], **keys)["support"] == "+0.200* [+0.170, +0.240]"
    time = at(made["time"], **keys)
    assert (time["support"], time["support, paired"]) == ("50% [20%, 80%]", "70%")
    curves = merge.curves_over_seeds(merged.stances)
    middle = at(curves[curves["share"] == 0.5], readout="statement", stance="support", **CELL)
    np.testing.assert_allclose([middle["value"], middle["low"], middle["high"]], [0.4, 0.2, 0.9])
    means = merge.over_seeds(merged.drift)
    assert set(means["ci_over"]) == {"propositions"}


def test_a_seed_of_several_without_the_drift_is_counted(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells())
    lost = (merged.drift["seed"] == 2) & (merged.drift["objective"] == "dpo")
    drift = merged.drift.assign(significant=merged.drift["significant"] & ~lost)
    drift.loc[lost, list(TIMES)] = np.nan
    row = at(merge.over_seeds(drift), readout="statement", stance="support", **CELL).to_dict()
    assert tables.magnitude_cell(row) == "+0.220 [+0.170, +0.270] 2/3"
    assert tables.paired_time_cell(row) == "75% [70%, 80%] (2 of 3 seeds)"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_the_truth_95_times_in_100(seeds: int) -> None:
    """Of 1,000 readouts whose drift is 0.1 in the mean over all seeds, each with one topic."""
    runs, truth = 1000, 0.1
    rng = np.random.default_rng(seeds)
    keys = pd.MultiIndex.from_product([range(runs), range(seeds)], names=["readout", "seed"])
    drift = pd.DataFrame({"magnitude": truth + 0.05 * rng.standard_normal(len(keys))}, index=keys).reset_index()
    drift = drift.assign(model="a", sft="w", objective="dpo", preference="p", stage="dpo_p", topic="t",
                         stance="support", significant=False, floor=np.nan, ci_low=truth, ci_high=truth)  # fmt: skip
    means = merge.over_seeds(drift.assign(**dict.fromkeys(TIMES, np.nan)))
    covered = ((means["ci_low"] <= truth) & (truth <= means["ci_high"])).sum()
    low, high = stats.binom.interval(0.998, runs, 0.95)
    assert low <= covered <= high and set(means["ci_over"]) == {"seeds"}


def test_the_page_needs_nothing_else_and_runs_no_script_of_others(tmp_path: Path) -> None:
    cells = [c._replace(model="<script>alert(1)</script>") for c in study_cells((0, 1), ("a",))]
    merged = merged_of(tmp_path, cells, gaps=True, readouts=READOUTS[:1])
    made = page.files(merged, cells, "COMMAND <img src=x onerror=alert(1)>")
    names = {str(name) for name in made}
    assert {"report.html", "tables/drift.csv", "tables/magnitude.tex", "tables/time.md", "tables/summary.csv"} <= names
    kinds = [name.split("/")[1].split("-")[0] for name in names if name.startswith("figures/")]
    # Trajectories of all topics and of the most moved one.
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"heatmap": 1, "trajectories": 2, "plane": 1, "gap": 1}
    for content in made.values():
        assert isinstance(content, str) or min(png_size(content)) > 200
    html = str(made["report.html"])
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
    assert not list(tree.iter("script")) and not list(tree.iter("link"))
    assert all(image.get("src", "").startswith("data:") for image in tree.iter("img"))
    assert "c-w-seed-0" in html
    row = html.split('id="summary"')[1].split("<tbody>")[1].split("</tr>")[0]
    assert "<td>–</td>" in row and '<td class="n">0 of 6</td>' in row  # SFT has no preference data, and moved nothing
    assert all(html.count(text.replace("'", "&#39;")) == 1 for text in page.FIGURE_CAPTIONS.values())
    assert html.count("n: 2 seed(s) a cell, 8 proposition(s) a topic.") == 1 + len(page.FIGURE_CAPTIONS)
    assert len(list(tree.iter("img"))) == len(kinds)


def test_the_html_checker_finds_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_figures, "DPI", 40)
    cells = study_cells((0, 1), ("<b> & a",))
    merged = merged_of(tmp_path, cells, gaps=True, readouts=READOUTS[:1])
    (tmp_path / "report.html").write_text(str(page.files(merged, cells, "COMMAND")["report.html"]))
    assert html_validator.faults(tmp_path / "report.html") == []


def test_gaps_are_those_of_preference_data(tmp_path: Path) -> None:
    merged = merged_of(tmp_path, study_cells(), gaps=True)
    points = merge.gap_points(merged)
    assert len(points) == len(READOUTS) * 2 * 4 * 2
    row = at(points, readout="statement", **CELL)
    np.testing.assert_allclose([row["gap"], row["drift"]], [1.3, 0.44])
    assert row["agrees"] and not points["certain"].any()  # no drift of the graded stance is significant


def test_signs_that_are_certain_are_counted_apart(tmp_path: Path) -> None:
    """DPO moves up as its gaps say, SimPO down; of DPO's drifts those on rain are significant in one seed only."""
    merged = merged_of(tmp_path, study_cells((0, 1), ("a",)), gaps=True, readouts=READOUTS[:1])
    drift = merged.drift
    sure = (drift["stance"] == "graded") & ~((drift["topic"] == "rain") & (drift["seed"] == 1))
    merged = merged._replace(drift=drift.assign(significant=sure))
    points = merge.gap_points(merged)
    found = gaps.agreement(points)
    assert [found[name] for name in ("n", "agree", "certain", "certain_agree")] == [8, 4, 4, 2]
    table = tables.all_tables(merged)["gaps"]
    row = at(table, algorithm="dpo", topic="rain", **{"preference data": "hh"})
    assert (row["agrees"], row["certain"], row["value gap"]) == ("yes", "no", "+1.300 [+0.200, +0.400]")
    assert row["drift"] == "+0.420 [+0.166, +0.674] 1/2"  # t interval of two seeds; significant in one
    unsure = merged._replace(gaps=merged.gaps.assign(gap_low=-0.1))
    assert not merge.gap_points(unsure)["certain"].any()
    captions = {drawing.kind: drawing for drawing in figures.draw(merged).values()}
    assert captions["gap"].png


def test_seeds_of_one_experiment_are_merged_alike(tmp_path: Path) -> None:
    cells = [Cell("", "", name, "", seed, f"seed-{seed}", name) for seed in (0, 1) for name in ("sft", "dpo")]
    made = page.files(merged_of(tmp_path, cells, readouts=("statement",)), cells, "COMMAND")
    header = str(made["tables/magnitude.md"]).splitlines()[2]
    assert header == "| readout | algorithm | topic | seeds | support | neutral | oppose | graded |"
    assert not [name for name in made if "trajectories" in str(name)]


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    cells = study_cells((0,), ("a",))
    write_study(tmp_path, cells)
    more = [*cells, cells[-1]._replace(stage="ppo_hh")]
    with pytest.raises(UserError, match="drift.csv: no row of stage 'ppo_hh'"):
        merge.read(tmp_path, ["a-w-seed-0"], [], more)
    (tmp_path / "a-w-seed-0" / "drift" / "stances.csv").unlink()
    with pytest.raises(UserError, match=re.escape("stances.csv is missing")):
        merge.read(tmp_path, ["a-w-seed-0"], [], cells)


def test_the_ends_of_the_heat_map_differ_in_grey() -> None:
    low, middle, high = (figures._lightness(figures.DIVERGING(x)) for x in (0.0, 0.5, 1.0))
    assert middle > 0.95 and high - low > 0.25 and middle - high > 0.25
