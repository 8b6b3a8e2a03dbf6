"""The benches of kernels: ratios, and goals that are met, missed or without a number."""

import subprocess
import sys

import jax
import pytest

from bench import kernel_goals, kernels


def rows(**values):
    return {
        name: {"name": name, "value": value, "of_ceiling": 0.5} for name, value in values.items()
    }


def test_ratios_are_of_rows_that_differ_in_the_side_alone():
    found = kernels.ratios(
        [
            {"name": f"op, {side}, 16 x 3", "value": value, "unit": unit}
            for side, value, unit in (
                ("xla", 2.0, "GB/s"),
                ("mosaic_gpu", 6.0, "GB/s"),
                ("torch", 3.0, "GB/s"),
                ("torch, time", 9.0, "us"),
            )
        ]
        + [{"name": "op, torch, 32 x 3", "value": 1.0, "unit": "GB/s"}]
    )
    assert found == {
        "op, 16 x 3: xla over torch": 2 / 3,
        "op, 16 x 3: mosaic_gpu over xla": 3.0,
        "op, 16 x 3: mosaic_gpu over torch": 2.0,
    }


def test_a_goal_is_met_missed_or_without_a_number():
    goals = (
        kernel_goals._value("a", 4, "TFLOP/s", "^a"),
        kernel_goals._ratio("b over a", 3, "^b", "^a"),
        kernel_goals._share("b", 0.6, "^b"),
        kernel_goals._value("c", 1, "TFLOP/s", "^c"),
        kernel_goals._value("either", 1, "TFLOP/s", "^[ab]"),
    )
    found = kernel_goals.judged(goals, rows(a=4.0, b=20.0))
    assert [row["met"] for row in found] == [True, True, False, False, False]
    assert [row["value"] for row in found] == [4.0, 5.0, 0.5, None, None]
    assert found[3]["why"] == "0 rows fit '^c'" and found[4]["why"] == "2 rows fit '^[ab]'"


def test_every_part_can_be_tried_out_and_no_number_is_no_goal_met():
    assert kernel_goals.SMALL.keys() == kernel_goals.PARTS.keys()
    for name, part in kernel_goals.PARTS.items():
        assert len(part.goals) == len(kernel_goals.SMALL[name].goals)
        assert not any(row["met"] for row in kernel_goals.judged(part.goals, {}))


def goals_command(*options):
    return subprocess.run(
        [sys.executable, "-m", "bench.kernel_goals", *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about machines without a GPU")
def test_without_a_gpu_the_goals_are_refused_in_one_line():
    done = goals_command()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "bench.kernel_goals: the goals are for a Hopper GPU; this is cpu. --try-out runs the commands in a simulator."
    )


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs the goals in a simulator")
def test_a_part_runs_in_the_simulator_and_finds_all_its_figures(tmp_path):
    done = goals_command(
        *("--try-out", "--rounds", "1", "--parts", "sefp_wide", "dispatch"),
        *("--json", str(tmp_path / "goals.json")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no number" not in done.stdout and done.stdout.count("not judged") == 10
    assert (tmp_path / "goals.json").exists()
