"""TensorBoard files hold the numbers of metrics.jsonl, and forget what a resumed run repeats."""

from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from qanchor.train.scalars import Scalars


def events(directory: Path) -> list[Event]:
    """Every event of a directory, in the order written: length, its checksum, data, checksum."""
    found = []
    for path in sorted(directory.glob("events.*")):
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            found.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return found


def test_numbers_are_found_again_and_repeated_steps_hidden(tmp_path: Path) -> None:
    first = Scalars(tmp_path, 1)
    for step in (1, 2, 3):
        first.write(step, {"loss": 10.0 - step})
    first.write(3, {"heldout_top1": 0.25})
    first.close()
    resumed = Scalars(tmp_path, 3)
    resumed.write(3, {"loss": 7.0})
    resumed.close()
    written = events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in written
        for value in event.summary.value
    ]
    assert scalars == [
        (1, "train/loss", 9.0),
        (2, "train/loss", 8.0),
        (3, "train/loss", 7.0),
        (3, "heldout/top1", pytest.approx(0.25)),
        (3, "train/loss", 7.0),
    ]
    starts = [event.step for event in written if event.session_log.status == 1]
    assert starts == [1, 3]
