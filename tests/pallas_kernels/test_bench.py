"""The benches of kernels: ratios, goals that are met, missed or without a number, and the search for settings."""

import json
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from bench import _kernels_index_topk, _kernels_sparse_mla, kernel_goals, kernels, tune
from pallas_kernels import _tuned
from pallas_kernels.grouped_matmul import config as grouped_config
from pallas_kernels.index_topk import config as index_config
from pallas_kernels.sefp import config as sefp_config
from pallas_kernels.sparse_mla import config as sparse_mla_config


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


def search(*candidates):
    return [tune.Candidate(settings, prepare) for settings, prepare in candidates]


def test_the_search_keeps_the_fastest_setting_that_is_right(tmp_path, capsys):
    def slow():
        time.sleep(0.05)
        return jnp.ones(3)

    def wrong():
        return jnp.zeros(3)

    def fails():
        raise ValueError("too much shared memory")

    def right(run):
        return lambda: tune._agrees(run, jnp.ones(3))

    candidates = search(
        ({"a": 1}, right(slow)),
        ({"a": 2}, right(wrong)),
        ({"a": 3}, right(lambda: jnp.ones(3))),
        ({"a": 4}, fails),
    )
    args = types.SimpleNamespace(calls=1, rounds=3)
    assert tune.best_of("key", candidates, args) == {"a": 3}
    said = capsys.readouterr().out
    assert "{'a': 2}: AssertionError: off by 1 of the largest" in said
    assert "{'a': 4}: ValueError: too much shared memory" in said
    assert tune.best_of("key", candidates[3:], args) is None

    table = tmp_path / "op.json"
    tune.keep(table, "key", {"a": 3})
    tune.keep(table, "other", {"a": 4})
    kept = json.loads(table.read_text())[jax.devices()[0].device_kind]
    assert {key: entry["settings"] for key, entry in kept.items()} == {
        "key": {"a": 3},
        "other": {"a": 4},
    }


@pytest.fixture
def measured(monkeypatch):
    """A function that puts settings under a key; nothing else is in the table."""
    table = {}
    monkeypatch.setattr(_tuned, "lookup", lambda op, key: table.get((op, key)))
    return lambda op, key, settings: table.update({(op, key): settings})


def test_measured_settings_go_before_the_heuristic_s(measured):
    narrow = sparse_mla_config.of_call(256, 2048, 132, eight_bit=False)
    settings = {"splits": 3, "prefetch": True, "producer_registers": 80, "consumer_registers": 208}
    measured("sparse_mla", sparse_mla_config.key_of(200, 2000, False), settings)
    assert sparse_mla_config.of_call(256, 2048, 132, eight_bit=False).splits == 3 != narrow.splits
    assert sparse_mla_config.of_call(256, 2048, 132, eight_bit=True).splits == 1
    assert sparse_mla_config.of_call(257, 2048, 132, eight_bit=False).splits == 1

    shape = 64, 4096, 8, 0
    found = list(sefp_config.tilings(*shape, 132))
    assert sefp_config.tiling(*shape, 132) in found
    other = next(t for t in found if t != sefp_config.tiling(*shape, 132))
    measured("sefp", sefp_config.key_of(*shape), vars(other))
    assert sefp_config.tiling(*shape, 132) == other


def test_a_measured_split_is_raised_to_what_shared_memory_needs(measured):
    settings = {"splits": 1, "prefetch": True, "producer_registers": 80, "consumer_registers": 208}
    measured("sparse_mla", sparse_mla_config.key_of(256, 4096, False), settings)
    assert sparse_mla_config.of_call(256, 4096, 132, eight_bit=False).splits == 2


@pytest.mark.parametrize("columns", [192, 576, 1408, 2048])
@pytest.mark.parametrize("rows", [100, 100_000])
def test_the_heuristic_s_tiling_of_a_grouped_matmul_is_among_those_timed(rows, columns):
    default = grouped_config.rows_heuristic(rows, 16, columns)
    assert tune.grouped_settings("forward", rows, 16, 128, columns)[0] == default
    default = grouped_config.outer_heuristic(192, columns)
    assert tune.grouped_settings("dw", rows, 16, 192, columns)[0] == default


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("blocks", [1, 64, 256])
def test_the_heuristic_s_sparse_mla_is_among_those_timed(measured, blocks, eight_bit):
    found = _kernels_sparse_mla.settings(blocks, 2048, eight_bit=eight_bit)
    default = sparse_mla_config.heuristic(blocks, 2048, 2, eight_bit=eight_bit)
    assert found[0] == default and len(set(found)) == len(found)
    measured("sparse_mla", sparse_mla_config.key_of(blocks, 2048, eight_bit), vars(found[-1]))
    assert _kernels_sparse_mla.settings(blocks, 2048, eight_bit=eight_bit) == found


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2048), (16, 1)])
def test_index_topk_s_sizes_are_kept_whole_and_don_t_depend_on_the_table(measured, batch, tokens):
    found = _kernels_index_topk.settings(batch, tokens, 4096)
    shape = batch, tokens, _kernels_index_topk.HEADS, _kernels_index_topk.SIZE
    assert index_config.Config(**found[0]) == index_config.chosen(shape, 4096, 2)
    measured("index_topk", index_config.key_of(batch, tokens, 4096), found[-1])
    assert index_config.chosen(shape, 4096, 2) == index_config.Config(**found[-1])
    assert _kernels_index_topk.settings(batch, tokens, 4096) == found


def test_every_tiling_to_time_divides_the_weights_and_fits():
    for groups, columns, planes in ((64, 14336, 0), (224, 4096, 5), (1, 64, 3), (6, 192, 1)):
        found = list(sefp_config.tilings(groups, columns, 8, planes, 132))
        assert found and len(set(found)) == len(found)
        for t in found:
            assert columns % (64 * t.warpgroups) == 0 == groups % (t.splits * t.groups)
            slot = t.groups * (64 * t.warpgroups * (33 + 8 * planes) + 128 * 8)
            assert t.stages == 1 or t.stages * slot <= 200 * 1024
