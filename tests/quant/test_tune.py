"""``jaxmoe tune`` on small models: all methods, the report, the picture, resuming."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from train.support import MODEL, RUN, records, write_corpus

import jaxmoe
import quant
from jaxmoe import checkpoint
from jaxmoe.cli import tune as cli
from jaxmoe.config import ModelConfig
from jaxmoe.train import load_corpus
from jaxmoe.train import tune as tuning
from jaxmoe.train.tune import SearchOptions, otaro_config, score_source, tune

C = dataclasses.replace(RUN, steps=8, save_every=5, learning_rate=1e-3)


DENSE = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)


def saved(directory, config):
    params = jaxmoe.init_params(config, jax.random.key(0))
    checkpoint.save(directory / "checkpoints", params, config, 1)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("source"), DENSE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(write_corpus(tmp_path_factory.mktemp("corpus")))


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_and_is_scored_at_every_width(
    source, corpus, tmp_path, monkeypatch
):
    arguments = (source, "otaro", DENSE, C, corpus)

    def kill(record):
        if record["step"] == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        tune(*arguments, tmp_path / "killed", on_step=kill)
    resumed = tune(*arguments, tmp_path / "killed")
    whole = tune(*arguments, tmp_path / "whole")
    exact = ("step", "width", "loss", "grad_norm", "applied")
    lines = [[[r[k] for k in exact] for r in records(tmp_path / d)] for d in ("killed", "whole")]
    assert lines[0] == lines[1] and [line[1] for line in lines[0]][:6] == [8, 7, 6, 5, 4, 3]
    assert resumed.losses == whole.losses and resumed.visits == whole.visits
    assert sum(whole.visits.values()) == 8
    assert all(np.isfinite(v) for v in (*whole.losses.values(), whole.unquantised, whole.mean))
    params, config = checkpoint.load(tmp_path / "whole")
    assert (
        whole.bytes[3] < 0.6 * whole.bytes[8] == 0.6 * quant.nbytes(quant.quantize_params(params))
    )
    assert config == DENSE
    with pytest.raises(ValueError, match="another method"):
        tune(source, "uniform", DENSE, C, corpus, tmp_path / "whole")
    before = score_source(source, DENSE, C, corpus)
    monkeypatch.setattr(tuning, "score", lambda *_: pytest.fail("scored again"))
    again = tune(*arguments, tmp_path / "whole")
    assert (again.losses, again.bytes, again.visits) == (whole.losses, whole.bytes, whole.visits)
    assert before.unquantised != whole.unquantised and before.losses[8] != before.losses[3]
    picture = tuning.plot_widths([before, whole], tmp_path / "widths.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_compares_methods_in_a_table_a_picture_and_a_report(tmp_path, capsys):
    from jaxmoe.cli import main

    path, source = write_corpus(tmp_path / "text"), saved(tmp_path / "source", MODEL)
    methods = ("otaro", "uniform", "joint", "fixed:3", "ptq", "otaro+nested")
    numbers = {"steps": 6, "batch-size": 4, "seq-len": 32, "eval-bytes": 2048, "warmup-steps": 1}
    flags = [str(x) for k, v in numbers.items() for x in (f"--{k}", v)]
    outputs = ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    main(["tune", str(source), "--method", *methods, "--data", str(path), *flags, *outputs])
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in (*methods, "untuned+nested", "E5M8", "E5M3", "mean", "float")
    )
    assert (tmp_path / "out" / "widths.png").is_file()
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {(r["method"], r["width"]): r for r in report["rows"] if "width" in r}
    untuned = ("untuned", "untuned+nested")
    assert set(rows) == {(m, w) for m in (*methods, *untuned) for w in range(3, 9)}
    assert rows["fixed:3", 3]["steps"] == 6 and rows["otaro", 3]["bytes"] == rows["ptq", 3]["bytes"]
    asked = {
        "mean_otaro_over_uniform",
        "m3_otaro_over_fixed:3",
        "m8_otaro+nested_over_unquantised_tuning",
    }
    assert set(report["ratios"]) >= asked


def test_a_method_that_there_is_not_is_refused():
    for name in ("fixed:9", "fixed:2", "fixed", "lora", "otaro+rounded", "+nested"):
        with pytest.raises(ValueError, match="method must be one of"):
            otaro_config(name, 10)
    assert otaro_config("fixed:4", 10).bps.widths == (4,)
    assert otaro_config("ptq", 10).rules == ()
    assert otaro_config("otaro", 10).rounding == "truncate"
    nested = otaro_config("otaro+nested", 10, SearchOptions(low_steps=3))
    assert nested == dataclasses.replace(
        otaro_config("otaro", 10, SearchOptions(low_steps=3)), rounding="nested"
    )
    assert otaro_config("otaro", 10, SearchOptions(low_steps=3)).laa.every == 3


def test_what_tuning_does_not_do_is_refused():
    with pytest.raises(ValueError, match="accumulate=2"):
        tuning.check(dataclasses.replace(C, accumulate=2))
    with pytest.raises(ValueError, match="stage=dsa_warmup"):
        tuning.check(dataclasses.replace(C, stage="dsa_warmup"))


def test_memory_is_counted_with_what_a_method_collects(source, monkeypatch):
    """Of otaro the collected gradients too: 16 bytes per parameter, not 12."""
    memory = {"SC_PAGE_SIZE": 14, "SC_PHYS_PAGES": jaxmoe.param_count(DENSE)}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)

    def reached(*_):
        raise Interrupted

    monkeypatch.setattr(cli, "load_corpus", reached)
    with pytest.raises(Interrupted):
        cli.tune(str(source), ("fixed:3",), options=C)
    with pytest.raises(ValueError, match="needs at least"):
        cli.tune(str(source), ("fixed:3", "otaro"), options=C)
