import io
import subprocess
import sys

import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_evidence import STAGES as OPEN_STAGES
from synthetic_evidence import make_evidence
from synthetic_scores import STAGES, make_scores
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vdjax.drift import tensorboard
from vdjax.drift.statistics import analyse

USE = """
import sys
from pathlib import Path
from vdjax.drift import report, tensorboard
writer = tensorboard.open_writer(Path(sys.argv[1]) / "tb")
tensorboard.scalars(writer, 1, {"loss": 2.0})
writer.close()
print([m for m in ("tensorflow", "jax", "torch", "matplotlib.pyplot") if m in sys.modules])
"""


@pytest.fixture(scope="module")
def png():
    buffer = io.BytesIO()
    Figure(figsize=(2, 1)).savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


def read(directory):
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0}).Reload()


def events(directory, tag):
    return [(e.step, e.value) for e in read(directory).Scalars(tag)]


def test_scalars_and_images_read_back(tmp_path, png):
    writer = tensorboard.open_writer(tmp_path)
    tensorboard.scalars(writer, 5, {"dpo/loss": 0.5, "dpo/kl": 0.25})
    tensorboard.scalars(writer, 6, {"dpo/loss": 0.375})
    tensorboard.images(writer, 6, {"figures/one": png})
    assert events(tmp_path, "dpo/loss") == [(5, 0.5), (6, 0.375)]  # on disk before the writer is closed
    writer.close()
    image = read(tmp_path).Images("figures/one")[0]
    assert (image.width, image.height, image.encoded_image_string) == (100, 50, png)


def test_a_run_that_goes_on_leaves_no_event_twice(tmp_path):
    writer = tensorboard.open_writer(tmp_path)
    for step in range(10):
        tensorboard.scalars(writer, step, {"loss": 1.0})
    writer.close()
    torn = writer.file.file.read_bytes()[:-5]  # killed while it wrote
    writer.file.file.write_bytes(torn)
    writer = tensorboard.open_writer(tmp_path, start_step=6)
    for step in range(6, 9):
        tensorboard.scalars(writer, step, {"loss": 2.0})
    writer.close()
    assert events(tmp_path, "loss") == [(s, 1.0) for s in range(6)] + [(s, 2.0) for s in range(6, 9)]


def test_a_clock_that_was_put_back_hides_nothing(tmp_path, monkeypatch):
    for now, step, value in ((2 * 10**18, 1, 0.5), (10**18, 2, 0.25)):
        monkeypatch.setattr(tensorboard.time, "time_ns", lambda now=now: now)
        writer = tensorboard.open_writer(tmp_path, start_step=step)
        tensorboard.scalars(writer, step, {"loss": value})
        writer.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    monkeypatch.undo()
    assert [int(name.split(".")[3]) for name in names] == [2 * 10**18, 2 * 10**18 + 1]
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_drift_events_are_replaced_and_carry_training_steps(tmp_path, png):
    analysis = analyse(make_scores({("sft", "beta"): 0.2}), STAGES, resamples=99, permutations=99)
    for _ in range(2):
        tensorboard.write_drift(
            tmp_path, analysis.stances, analysis.drift, {"sft": 100, "dpo_hh": 60}, {"drift-1": png}
        )
    assert len(list(tmp_path.iterdir())) == 1
    table = analysis.stances.query("stage == 'sft' and topic == 'beta' and stance == 'support'")
    values = events(tmp_path, "statement/sft/value/beta/support")
    assert [step for step, _ in values] == [0, 5, 20, 50, 100]
    assert [value for _, value in values] == pytest.approx(table["value"].tolist(), rel=1e-6)
    drift = events(tmp_path, "statement/sft/drift/beta/support")
    assert drift[0] == (0, 0.0) and drift[-1][1] == pytest.approx(0.2, abs=0.02)
    assert events(tmp_path, "statement/sft/magnitude/beta/support")[0] == pytest.approx((100, drift[-1][1]))
    assert [e.step for e in read(tmp_path).Images("figures/drift-1")] == [100]


def test_every_number_of_the_tables_at_its_step(tmp_path):
    """All readouts, stages, topics and quantities; what is not defined has no event."""
    scores, _ = make_evidence(propositions=3, replicates=1)
    analysis = analyse(scores, OPEN_STAGES, resamples=99, permutations=99)
    tensorboard.write_drift(tmp_path, analysis.stances, analysis.drift, {"sft": 100, "dpo": 60}, {})
    reader = read(tmp_path)
    found = {(tag, e.step): e.value for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)}
    values = analysis.stances.dropna(subset="value")
    expected = {
        (f"{r.readout}/{r.stage}/value/{r.topic}/{r.stance}", r.step): r.value for r in values.itertuples()
    } | {
        (f"{r.readout}/{r.stage}/magnitude/{r.topic}/{r.stance}", r.to_step): r.magnitude
        for r in analysis.drift.dropna(subset="magnitude").itertuples()
    }  # fmt: skip
    shown = {key: value for key, value in found.items() if "/drift/" not in key[0]}
    assert shown.keys() == expected.keys() and len({key[0].split("/")[0] for key in shown}) == 3
    assert all(shown[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9) for key in expected)
    for (tag, step), value in expected.items():
        if "/magnitude/" in tag:  # the last drift event is the magnitude
            assert found[tag.replace("/magnitude/", "/drift/"), step] == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_no_tensorflow_is_imported_even_where_there_is_one(tmp_path):
    fake = tmp_path / "site"
    (fake / "tensorflow").mkdir(parents=True)
    (fake / "tensorflow" / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = f"import sys; sys.path.insert(0, {str(fake)!r})\n{USE}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert events(tmp_path / "tb", "loss") == [(1, 2.0)]


def test_png_size(png):
    assert tensorboard.png_size(png) == (100, 50)


def test_drift_without_rows(tmp_path):
    analysis = analyse(make_scores().query("step == 0"), STAGES, resamples=99, permutations=99)
    assert isinstance(analysis.drift, pd.DataFrame) and analysis.drift.empty
    tensorboard.write_drift(tmp_path, analysis.stances, analysis.drift, {}, {})
    assert len(events(tmp_path, "statement/sft/value/alpha/support")) == 1
