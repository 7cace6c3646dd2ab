"""Workdirs, data and models in a bucket, which stands on this machine (`fake_gcs.py`)."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import experiments
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from test_experiment import all_params, metrics

from vdjax import config as configs
from vdjax import files, snapshots
from vdjax.errors import UserError
from vdjax.export import export
from vdjax.measure import holds
from vdjax.models import hf


def test_other_urls_and_buckets_without_gcsfs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.as_path("runs/a") == Path("runs/a") and files.as_path("~/a") == Path.home() / "a"
    with pytest.raises(UserError, match="s3://b/x: expected a path, or gs://BUCKET/"):
        files.as_path("s3://b/x")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gs://b/x: .* pip install 'vdjax\[tpu\]'"):
        files.as_path("gs://b/x")


def test_files_are_written_whole_added_to_and_removed(bucket: Path) -> None:
    folder = bucket / "files"
    content = os.urandom(6_000_000)  # more than gcsfs sends at once
    files.write_whole(folder / "a" / "large", content)
    assert (folder / "a" / "large").read_bytes() == content
    for text in ("ä\n", "b\n"):
        files.append(folder / "log", text)
    assert (folder / "log").read_text() == "ä\nb\n"
    assert [str(file) for file in sorted(files.under(folder))] == [f"{folder}/a/large", f"{folder}/log"]
    assert files.absolute(folder) == folder
    files.remove_tree(folder / "a")
    assert not (folder / "a").exists() and (folder / "log").exists()


def test_what_is_read_from_a_bucket_is_what_is_read_from_a_disk(bucket: Path, tmp_path: Path) -> None:
    for folder in (bucket / "read", tmp_path):
        files.write_whole(folder / "text", "\ufeffä\r\nb".encode())
        assert files.read_text(folder / "text", "it") == "ä\nb"
        files.write_whole(folder / "rows.jsonl", '\ufeff{"a": 1}\n'.encode())
        assert [row for _, row in files.json_objects(folder / "rows.jsonl", "--rows", "a")] == [{"a": 1}]
        table = pd.DataFrame({"a": [1, 1], "b": [1, 2]})
        files.write_whole(folder / "x.parquet", table.to_parquet(index=False))
        files.write_whole(folder / "x.csv", table.to_csv(index=False))
        for name in ("x.parquet", "x.csv"):
            pd.testing.assert_frame_equal(files.read_table(folder / name), table)
        assert holds(folder / "x.parquet", a=1) and not holds(folder / "x.parquet", b=1)
        assert not holds(folder / "x.parquet", c=1) and not holds(folder / "x.csv", a=1)
        files.write_array(folder / "x.npy", np.arange(3))
        np.testing.assert_array_equal(files.read_array(folder / "x.npy", ""), np.arange(3))
        for read in (files.read_table, files.read_kept, files.kept_lines, lambda file: files.read_array(file, "")):
            with pytest.raises(UserError, match=f"{folder}/none: cannot be read back"):
                read(folder / "none")
        with pytest.raises(UserError, match=f"{folder}/none cannot be read"):
            files.read_text(folder / "none", "it")


def test_a_file_that_grows_is_uploaded_now_and_then(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = files.Growing(bucket / "growing", b"0")
    file.write(b"1")
    file.flush()
    assert not file.file.exists()
    file.sync()
    assert file.file.read_bytes() == b"01"
    monkeypatch.setattr(files, "UPLOAD_S", -1.0)
    file.sync()
    file.write(b"2")
    file.flush()
    assert file.file.read_bytes() == b"012"
    file.write(b"3")
    file.close()
    assert file.file.read_bytes() == b"0123"


def test_what_marks_a_folder_as_whole_comes_last(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, transfer = [], files._transfer
    monkeypatch.setattr(files, "_transfer", lambda a, b: (order.append(b), transfer(a, b)))
    with files.making(bucket / "whole", "meta.json") as part:
        for name in ("meta.json", "z", "inner/a"):
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(name)
    assert order[-1] == bucket / "whole" / "meta.json" and len(order) == 3
    assert (bucket / "whole" / "inner" / "a").read_text() == "inner/a"
    with pytest.raises(OSError, match="full"), files.making(bucket / "half", "z"):
        raise OSError("full")
    assert not (bucket / "half").exists()


def test_a_local_copy_is_fetched_once_and_again_when_the_bucket_changes(bucket: Path) -> None:
    folder = bucket / "model"
    for name in ("a", "inner/b"):
        files.write_whole(folder / name, name)
    copy = files.local_copy(folder)
    assert (copy / "a").read_text() == "a" and (copy / "inner" / "b").read_text() == "inner/b"
    (copy / "a").write_text("kept")
    assert files.local_copy(folder) == copy and (copy / "a").read_text() == "kept"
    files.write_whole(folder / "a", "changed")
    assert (files.local_copy(folder) / "a").read_text() == "changed"
    assert files.local_copy(folder / "a").read_text() == "changed"


def test_a_database_is_put_back_where_it_was_changed(bucket: Path) -> None:
    file = bucket / "calls" / "replies.sqlite"
    for expected in (1, 2):
        with files.edited(file) as local, sqlite3.connect(local) as db:
            db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            db.execute("INSERT INTO t VALUES (1)")
            assert db.execute("SELECT count(*) FROM t").fetchone() == (expected,)
    before = files.content_key(file), file.stat()
    with files.edited(file) as local:
        sqlite3.connect(local).execute("SELECT * FROM t")
    assert (files.content_key(file), file.stat()) == before


def test_a_half_snapshot_is_none_and_is_written_over(bucket: Path) -> None:
    folder, saver = bucket / "half" / "snapshots", snapshots.saver()
    for value in (1.0, 2.0):
        snapshots.save(saver, folder, 3, {"x": jnp.full(4, value)})
        saver.wait_until_finished()
        assert snapshots.kept(folder) == [3]
        (folder / "3" / snapshots.COMMITTED).unlink()
        assert snapshots.kept(folder) == []
        with pytest.raises(UserError, match="gs://bucket/half/snapshots/3 is no snapshot"):
            snapshots.open_reader(folder / "3")
    snapshots.save(saver, folder, 3, {"x": jnp.full(4, 2.0)})
    saver.close()
    np.testing.assert_array_equal(snapshots.open_reader(folder / "3")(("x",), (slice(1, 3),)), [2.0, 2.0])


@pytest.fixture(scope="module")
def run(bucket: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment on data in a bucket, killed while it saves, and brought to its end as on another machine."""
    for file in tiny_data.glob("*.jsonl"):
        files.write_whole(bucket / "data" / file.name, file.read_bytes())
    workdir, spec = bucket / "run", f"{tiny.HERE / 'tiny_config.py'}:{bucket / 'data'}"
    command = [sys.executable, str(tiny.HERE / "stop_at.py"), "SAVE", "dpo", "4"]
    command += ["--config", spec, "--workdir", str(workdir)]
    environment = tiny.environment() | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("machine"))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (workdir / "sft" / "done.json").exists() and (workdir / "dpo" / "resume" / "2").is_dir()
    experiments.run(configs.load(spec), workdir)
    return workdir


def test_a_run_in_a_bucket_is_that_on_a_disk(run: Path, finished: tuple[Path, list[str]]) -> None:
    local = finished[0]
    for stage in ("sft", "dpo"):
        assert snapshots.kept(run / stage / "snapshots") == snapshots.kept(local / stage / "snapshots") == [0, 2, 4, 6]
        for step in (0, 2, 4, 6):
            one, other = (all_params(workdir / stage / "snapshots" / str(step)) for workdir in (local, run))
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=f"{stage} {step} {name}")
        assert metrics(run, stage) == metrics(local, stage)
        asked = [files.read_table(workdir / "probes" / f"{stage}.parquet") for workdir in (local, run)]
        pd.testing.assert_frame_equal(*asked)
        assert not (run / stage / "resume").exists()
    tables = [pd.read_csv(workdir / "drift" / "drift.csv")["magnitude"] for workdir in (local, run)]
    pd.testing.assert_series_equal(*tables)
    assert (run / "report.html").exists()
    assert not list(Path().glob("gs:*"))


def test_curves_of_a_run_in_a_bucket_are_whole(run: Path) -> None:
    curves = [files.local_copy(file) for file in sorted((run / "tb" / "dpo").glob("*"))]
    assert len(curves) == 2 and all(list(RawEventFileLoader(str(file)).Load()) for file in curves)
    assert len(list((run / "tb" / "drift").glob("*"))) == 1


def content(file: Path) -> Any:
    """The bytes of a file; of safetensors, whose metadata have no order, the header and the bytes behind it."""
    whole = file.read_bytes()
    if file.suffix != ".safetensors":
        return whole
    size = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:size]), whole[size:]


def test_a_snapshot_is_exported_from_bucket_to_bucket(
    run: Path, finished: tuple[Path, list[str]], bucket: Path, tmp_path: Path
) -> None:
    export(run / "dpo" / "snapshots" / "6", bucket / "out")
    export(finished[0] / "dpo" / "snapshots" / "6", tmp_path / "out")
    copy = hf.resolve("gs://bucket/out")
    assert {file.name for file in copy.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    for file in (tmp_path / "out").iterdir():
        assert content(copy / file.name) == content(file), file.name
    assert hf.fetch_config("gs://bucket/out") == json.loads((copy / "config.json").read_text())
    with pytest.raises(UserError, match="gs://bucket/out: already holds safetensors"):
        export(run / "dpo" / "snapshots" / "6", bucket / "out")
    with pytest.raises(UserError, match="gs://bucket/nothing: no such directory"):
        hf.resolve("gs://bucket/nothing")


def test_a_study_that_pays_for_judges_needs_a_disk(bucket: Path) -> None:
    from vdjax import study

    config: Any = configs.experiment()
    config.judges.paid = configs.judge("api", model="m")
    with pytest.raises(UserError, match="gs://bucket/study: judges behind an API"):
        study.run_all({"one": config}, bucket / "study", {})
