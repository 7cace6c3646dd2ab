"""TensorBoard event files without TensorFlow.

tensorboard's own EventFileWriter imports TensorFlow wherever that happens to be installed, and writes from a thread.
Its record writer and protocol buffers are plain Python, so an event file is opened here and written as it comes.

Steps are a stage's own; tags carry the stage. A writer that is opened at a step makes TensorBoard forget what the
same directory held from that step on, so a run that goes on after an interruption leaves no event twice. Hence one
directory a stage for training curves.
"""

import io
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vdjax.files import Growing, write_whole


class Writer(NamedTuple):
    """An open event file. Close it with `close`."""

    records: RecordWriter
    file: Growing | io.BytesIO

    def sync(self) -> None:
        """What was written is in the bucket, if the file is."""
        if isinstance(self.file, Growing):
            self.file.sync()

    def close(self) -> None:
        self.records.close()


def open_writer(directory: Path, start_step: int = 0) -> Writer:
    """A new event file in `directory`; what the directory's older files hold from `start_step` on is void."""
    return _open(Growing(directory / _file_name(directory)), start_step)


def scalars(writer: Writer, step: int, values: Mapping[str, float]) -> None:
    """Write {tag: value} at a step, and flush."""
    _write(writer, step, [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()])


def images(writer: Writer, step: int, pngs: Mapping[str, bytes]) -> None:
    """Write {tag: PNG file content} at a step, and flush."""
    _write(writer, step, [Summary.Value(tag=tag, image=_image(png)) for tag, png in pngs.items()])


def write_drift(
    directory: Path,
    stances: pd.DataFrame,
    drift: pd.DataFrame,
    last_steps: Mapping[str, int],
    pngs: Mapping[str, bytes],
) -> None:
    """Replace the drift events in `directory` (its own, as the older event files in it are removed).

    Tags `READOUT/STAGE/value/TOPIC/QUANTITY` and `READOUT/STAGE/drift/TOPIC/QUANTITY` (value minus the stage's first
    value), at each snapshot's step; `READOUT/STAGE/magnitude/TOPIC/QUANTITY` at the stage's last; `figures/NAME` at the
    last step of all. Values that are not defined (NaN: no stance was taken) are left out, as they are in the figures.
    `stances` and `drift` are those of `statistics.Analysis`; `last_steps` holds each stage's last training step.
    """
    old = list(directory.glob("*tfevents*"))
    final = directory / _file_name(directory)
    content = io.BytesIO()
    writer = _open(content, 0)
    groups = stances.dropna(subset="value").groupby(["readout", "stage", "topic", "stance"], sort=False)
    for (readout, stage, topic, stance), rows in groups:
        rows = rows.sort_values("step")
        first = rows["value"].iloc[0]
        for step, value in zip(rows["step"], rows["value"], strict=True):
            tags = {"value": value, "drift": value - first}
            scalars(writer, int(step), {f"{readout}/{stage}/{what}/{topic}/{stance}": v for what, v in tags.items()})
    for row in drift.dropna(subset="magnitude").to_dict("records"):
        tag = f"{row['readout']}/{row['stage']}/magnitude/{row['topic']}/{row['stance']}"
        scalars(writer, int(row["to_step"]), {tag: row["magnitude"]})
    images(writer, max(last_steps.values(), default=0), {f"figures/{name}": png for name, png in pngs.items()})
    write_whole(final, content.getvalue())
    for path in old:
        path.unlink(missing_ok=True)


def _file_name(directory: Path) -> str:
    # Readers take a directory's files in the order of their names, so a new name sorts last, even where the clock was
    # put back.
    stamps = [file.name.split(".")[3] for file in directory.glob("events.out.tfevents.*")]
    stamp = max([time.time_ns(), *(int(text) + 1 for text in stamps if text.isdecimal())])
    return f"events.out.tfevents.{stamp:020d}.{os.getpid()}"


def _open(file: Growing | io.BytesIO, start_step: int) -> Writer:
    writer = Writer(RecordWriter(file), file)
    _record(writer, Event(wall_time=time.time(), file_version="brain.Event:2"))
    start = SessionLog(status=SessionLog.START)
    _record(writer, Event(wall_time=time.time(), step=start_step, session_log=start))
    writer.records.flush()
    return writer


def _write(writer: Writer, step: int, values: list[Summary.Value]) -> None:
    _record(writer, Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.records.flush()


def _record(writer: Writer, event: Event) -> None:
    writer.records.write(event.SerializeToString())


def _image(png: bytes) -> Summary.Image:
    width, height = png_size(png)
    return Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file in pixels, from the header chunk that every PNG file starts with."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height
