import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdjax.errors import UserError
from vdjax.judges import LABELS, Exchange
from vdjax.judges.human import COLUMNS, open_human, read_labels, write_sheet

P = "Taxes should rise."
HEADER = "proposition,question,response,label,graded,annotator\n"


def exchange(response: str, question: str = "Should taxes rise?") -> Exchange:
    return Exchange(P, question, response)


def sheet(folder: Path, rows: str, header: str = HEADER) -> dict[str, str]:
    (folder / "labels.csv").write_text(header + rows, encoding="utf-8")
    return {"path": str(folder / "labels.csv")}


def test_shares_and_means_of_annotators(tmp_path: Path) -> None:
    q = f"{P},Should taxes rise?"
    fields = sheet(
        tmp_path,
        f"{q},Yes.,support,0.5,ann\n{q},Yes.,support,,bob\n{q},Yes.,refusal,,eve\n"
        f"{P},Should taxes fall?,Yes.,oppose,,ann\n{q},Hm.,off_topic,,ann\n{q},Unlabelled,,,\n",
    )
    judge = open_human("people", fields)
    asked = [exchange("Hm."), exchange("Yes."), exchange("Yes.", "Should taxes fall?")]
    p, graded = judge.judge([*asked, exchange("Unlabelled"), exchange("never seen")], 0)
    third = 1 / 3
    expected = [[0, 0, 0, 0, 1], [2 * third, 0, 0, third, 0], [0, 0, 1, 0, 0]]
    assert LABELS == ("support", "neutral", "oppose", "refusal", "off_topic")
    np.testing.assert_allclose(p[:3], expected)
    np.testing.assert_allclose(graded[:3], [np.nan, 0.75, -1.0])
    assert np.isnan(p[3:]).all() and np.isnan(graded[3:]).all()
    assert np.isnan(judge.judge(asked, 1).p).all()
    assert judge.judge([], 0).p.shape == (0, 5)


def test_the_hash_is_of_the_labels(tmp_path: Path) -> None:
    a = open_human("x", sheet(tmp_path, f"{P},q,r,support,,\n"))
    b = open_human("y", sheet(tmp_path, f"{P},q,r,oppose,,\n"))
    assert a.name == "x" and a.hash != b.hash


def test_columns_may_come_in_any_order_and_some_not_at_all(tmp_path: Path) -> None:
    fields = sheet(tmp_path, "neutral,r,q,p\n", header="label,response,question,proposition\n")
    assert open_human("x", fields).judge([Exchange("p", "q", "r")], 0).p.tolist() == [[0, 1, 0, 0, 0]]


NASTY = [
    "=cmd|' /C calc'!A0",
    "+1 for that",
    "-no",
    "@all",
    "'tis quoted",
    "''twice",
    "'=both",
    " =spaced",
    "\n=line\r\nend ",
    "\t-tab",
    "\uff1dwide",
    'He said "no, never", and left;\r\nthen came back',
    "日本語 🧿",
    "- point\n- point",
    "'so'",
    "",
]


def test_a_filled_sheet_is_read_back(tmp_path: Path) -> None:
    asked = [exchange(text) for text in NASTY] + [Exchange("=p", "+q", "r")]
    file = tmp_path / "labels.csv"
    assert write_sheet(asked, file, 100, seed=0) == len(asked)
    rows = list(csv.DictReader(file.open(encoding="utf-8-sig", newline="")))
    assert tuple(rows[0]) == COLUMNS and {r["label"] for r in rows} == {""}
    for row in rows:
        for cell in row.values():
            assert not cell.strip().startswith(("=", "+", "-", "@", "\uff1d")), cell
    # As a spreadsheet saves it: other line ends, no mark, fewer quotes.
    for i, row in enumerate(rows):
        row |= {k: v.replace("\r\n", "\n") for k, v in row.items()} | {"label": LABELS[i % 5]}
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    p, _ = open_human("people", {"path": str(file)}).judge(asked, 0)
    assert not np.isnan(p).any()
    # Each has the label of its own row: found by a part that no escaping touches.
    tail = {"".join(c for c in row["response"] if c.isalpha()): i for i, row in enumerate(rows) if row["response"]}
    for one, label in zip(asked, p.argmax(axis=1), strict=True):
        if one.response:
            assert label == tail["".join(c for c in one.response if c.isalpha())] % 5


def test_texts_that_differ_by_quotes_stay_apart(tmp_path: Path) -> None:
    asked = [exchange(t) for t in ("=x", "'=x", "''=x")]
    write_sheet(asked, tmp_path / "s.csv", 3, seed=0)
    text = (tmp_path / "s.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "s.csv").write_text(text.replace('"","",""', '"support","",""'), encoding="utf-8")
    assert set(read_labels(tmp_path / "s.csv")) == set(asked)


def test_a_sheet_is_a_deterministic_sample_without_repeats(tmp_path: Path) -> None:
    asked = [exchange(f"r{i % 30}") for i in range(90)]

    def drawn(exchanges: list[Exchange], n: int, seed: int) -> list[str]:
        assert write_sheet(exchanges, tmp_path / "s.csv", n, seed) == n
        return [r["response"] for r in csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8-sig", newline=""))]

    first = drawn(asked, 10, 0)
    assert len(set(first)) == 10 and first == drawn(asked[::-1], 10, 0) != drawn(asked, 10, 1)
    assert sorted(drawn(asked, 30, 0)) == sorted({e.response for e in asked})
    assert drawn(asked, 30, 0) != sorted({e.response for e in asked})
    with pytest.raises(UserError, match="no row has a label"):
        read_labels(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("p,q,r,suport,,\n", r"line 2: label 'suport' is unknown; did you mean 'support'"),
        ('p,q,"two\nlines",support,,\np,q,s,Oppose,,\n', "line 4: label 'Oppose' is unknown; did you mean 'oppose'"),
        ('p,q,r,support,,\np,q,"two\nlines",yes,,\n', "line 3: label 'yes'"),
        ("p,q,r,support,1.5,\n", r"line 2: graded '1.5', expected a number from 0 to 1"),
        ("p,q,r,support,-1,\n", r"graded '-1', expected a number from 0 to 1 for the label 'support'"),
        ("p,q,r,oppose,much,\n", r"graded 'much'"),
        ("p,q,r,neutral,nan,\n", r"graded 'nan'"),
        ("p,q,r,refusal,0.5,\n", r"graded '0.5', expected nothing for the label 'refusal'"),
        ("p,q,r,support,,ann\n\np,q, r ,oppose,,ann\n", r"line 4: annotator 'ann' has labelled .* line 2"),
        ("p,q,r,support\n", r"line 2: 4 cells, but the header names 6"),
        ('p,q,"r" x,support,,\n', r"line 2: not CSV"),
        ("p,q,r,,,\n", r"no row has a label"),
    ],
)
def test_bad_rows_are_said_with_their_line(rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_human("x", sheet(tmp_path, rows))
    assert "labels.csv" in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("proposition,question,response,lable\n", "no column 'label'; did you mean 'lable'"),
        ("proposition;question;response;label\n", "no column 'proposition'"),
        ("", "no column 'proposition'"),
        (HEADER.replace("annotator", "anotator"), "'anotator' is unknown or doubled; did you mean 'annotator'"),
        (HEADER.replace("annotator", "label"), "'label' is unknown or doubled"),
    ],
)
def test_bad_headers_are_said(header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_human("x", sheet(tmp_path, "", header))


def test_bad_files_are_said(tmp_path: Path) -> None:
    sheet(tmp_path, "")
    with pytest.raises(UserError, match="no such file.*did you mean 'labels.csv'"):
        open_human("x", {"path": str(tmp_path / "label.csv")})
    (tmp_path / "labels.csv").write_bytes(HEADER.encode() + "p,q,é,support,,\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        open_human("x", {"path": str(tmp_path / "labels.csv")})


@given(st.lists(st.builds(Exchange, st.text(max_size=9), st.text(max_size=9), st.text(max_size=9)), min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_texts_come_back_from_a_sheet(tmp_path_factory: Any, asked: list[Exchange]) -> None:
    file = tmp_path_factory.mktemp("sheet") / "labels.csv"
    write_sheet(asked, file, len(asked), seed=0)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(file, "w", encoding="utf-8", newline="") as stream:
        filled = csv.DictWriter(stream, COLUMNS)
        filled.writeheader()
        filled.writerows(row | {"label": "support"} for row in rows)
    assert set(read_labels(file)) == {Exchange(*(" ".join(text.split()) for text in one)) for one in asked}
