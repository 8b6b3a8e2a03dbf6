"""The record of a run: one line and one event per step, whatever was killed in between."""

import json

import pytest

from jaxmoe.train.metrics import Metrics, scalars


def read(directory):
    """(step, value) of every event by tag, as TensorBoard reads them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(directory), {"scalars": 0}).Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def record(step, loss):
    line = {"step": step, "loss": loss, "load_max_over_mean": [1.5, 2.0], "load": [[1, 2]]}
    return line | ({"bits_per_byte": 3.0} if step % 2 == 0 else {})


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_events_hold_the_numbers_of_the_lines(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(record(step, step / 2))
        before = read(tmp_path)  # with the system, though nothing was closed
    assert before == {
        "loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "bits_per_byte": [(2, 3.0)],
        "load_max_over_mean/1": [(1, 1.5), (2, 1.5), (3, 1.5)],
        "load_max_over_mean/2": [(1, 2.0), (2, 2.0), (3, 2.0)],
    }
    assert [dict(scalars(line))["loss"] for line in lines(tmp_path)] == [0.5, 1.0, 1.5]


def test_a_run_that_goes_on_has_each_step_once(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.write(record(step, 1.0))
    # Killed while it wrote: both end in the middle of something.
    (events,) = tmp_path.glob("events.out.tfevents.*")
    events.write_bytes(events.read_bytes()[:-7])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with Metrics(tmp_path, 3) as metrics:  # the last checkpoint
        for step in range(4, 8):
            metrics.write(record(step, 2.0))
    expected = [(step, 1.0 if step <= 3 else 2.0) for step in range(1, 8)]
    assert read(tmp_path)["loss"] == expected
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected


def test_a_step_that_is_done_again_counts_as_the_last_time(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step, loss in ((1, 1.0), (2, 1.0), (3, 1.0)):
            metrics.write(record(step, loss))
        metrics.drop_after(1)
        for step in (2, 3):
            metrics.write(record(step, 2.0))
    expected = [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert read(tmp_path)["loss"] == expected
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected


def test_a_run_without_events_gets_them_for_all_its_lines(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record(step, 1.0)) + "\n" for step in (1, 2, 3))
    with Metrics(tmp_path, 2) as metrics:
        metrics.write(record(3, 2.0))
    assert read(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]
