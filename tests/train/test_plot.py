"""The picture of a run."""

import json

import matplotlib.image
import numpy as np
import pytest

from jaxmoe.train.dsa import ORIGIN
from jaxmoe.train.plot import plot_run, plot_runs


def write(directory, load=True):
    directory.mkdir(exist_ok=True)
    lines = []
    for step in range(1, 41):
        line = {"step": step, "loss": 5.0 / step}
        if load:
            line |= {"load_max_over_mean": [1.5, 1.1], "load": [[step, 3, 2, 1], [4, 4, 4, 4]]}
        if step % 20 == 0:
            line |= {"bits_per_byte": 8.0 / step, "held_out_loss": 5.0 / step}
        lines.append(json.dumps(line))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("load", [True, False])
def test_the_plot_is_a_png_with_something_on_it(tmp_path, load):
    write(tmp_path, load)
    path = plot_run(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_skipped_steps_and_stages_of_other_depths_are_drawn(tmp_path):
    write(tmp_path / "first")
    write(tmp_path / "second")
    path = tmp_path / "second" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record |= {"load_max_over_mean": [1.5], "load": [[1, 3, 2, 1]]}
    records[3] |= {"loss": None, "skipped": 1.0}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    origin = {"init_from": str(tmp_path / "first")}
    (tmp_path / "second" / ORIGIN).write_text(json.dumps(origin))
    assert plot_run(tmp_path / "second").read_bytes().startswith(b"\x89PNG")


def test_no_metrics_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="train first"):
        plot_run(tmp_path)


def test_curves_of_runs_lie_over_each_other_where_one_has_them(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", load=False)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # it is being written
    one = matplotlib.image.imread(plot_runs([tmp_path / "a"], tmp_path / "one.png"))
    both = matplotlib.image.imread(
        plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    )
    assert one.shape == both.shape and not np.array_equal(one, both)
    without = matplotlib.image.imread(plot_runs([tmp_path / "b"], tmp_path / "without.png"))
    assert without.shape[1] < one.shape[1]  # no load, no panel for it


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 41 is not JSON"):
        plot_runs([tmp_path], tmp_path / "a.png")
