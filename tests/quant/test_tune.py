"""``jaxmoe tune`` on small models: all methods, the report, the picture, resuming."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from train.support import MODEL, RUN, records, write_corpus

import jaxmoe
import quant
from jaxmoe import checkpoint
from jaxmoe.cli import tune as cli
from jaxmoe.config import ModelConfig
from jaxmoe.train import load_corpus, widths
from jaxmoe.train import tune as tuning
from jaxmoe.train._tune_files import Weights
from jaxmoe.train.tune import SearchOptions, otaro_config, score_source, tune
from quant.rules import name_of

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
    picture = widths.plot_widths([before, whole], tmp_path / "widths.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_speed_of_every_width_is_the_median_of_calls_in_turns(tmp_path, monkeypatch):
    params = jaxmoe.init_params(DENSE, jax.random.key(0))
    calls = []

    def seconds(run):
        """The first turn compiles; then 1, 9 and 2 s, times the width."""
        tree, _, prompt, tokens = run.args
        found = [t.width for t in quant.tensors(tree)]
        calls.append((found[0] if found else 0, prompt.shape, tokens))
        return (100.0, 1.0, 9.0, 2.0)[(len(calls) - 1) // 7] * max(calls[-1][0], 1)

    monkeypatch.setattr(widths, "_seconds", seconds)
    speeds = widths.decode_speeds(params, DENSE, tokens=4, rounds=3)
    assert speeds == {0: 4 / 2, **{w: 4 / (2 * w) for w in range(3, 9)}}
    assert calls[:7] == calls[7:14] and set(calls) == {(w, (1, 8), 4) for w in speeds}
    ones = dict.fromkeys(range(3, 9), 1.0)
    result = tuning.Widths("untuned", ones, ones, 1.0, dict.fromkeys(ones, 1), {}, 0, 0.0, None)
    plain = widths.plot_widths([result], tmp_path / "plain.png").read_bytes()
    assert widths.plot_widths([result], tmp_path / "speeds.png", speeds).read_bytes() != plain
    with pytest.raises(ValueError, match="at least 1; got 0 and 1"):
        widths.decode_speeds(params, DENSE, tokens=0, rounds=1)


LORA = quant.Lora(rank=4)
LOW = dataclasses.replace(C, steps=18, learning_rate=1e-2)


def adapters_of(directory):
    """What a checkpoint holds beside merged weights."""
    abstract = tuning.abstract_state(DENSE, LOW, otaro_config("otaro", 18), LORA)
    target = (abstract.opt_state, abstract.bps, abstract.laa, abstract.params)
    return checkpoint.restore(directory / "checkpoints", train_state=target).train_state


@pytest.fixture(scope="module")
def adapted(source, corpus, tmp_path_factory):
    """Of a run with adapters that was killed, and that the command ended: its directory and its report."""
    from jaxmoe.cli import main

    home = tmp_path_factory.mktemp("adapted")
    path = write_corpus(home / "text")

    def kill(record):
        if record["step"] == 12:
            raise Interrupted

    with pytest.raises(Interrupted):
        tune(source, "otaro", DENSE, LOW, corpus, home / "otaro", lora=LORA, on_step=kill)
    given = dataclasses.asdict(LOW)
    same = ("steps", "batch_size", "seq_len", "learning_rate", "warmup_steps", "eval_every")
    names = (*same, "eval_bytes", "probe_bytes", "save_every")
    flags = [str(x) for n in names for x in ("--" + n.replace("_", "-"), given[n])]
    outputs = ["--output", str(home), "--json", str(home / "r.json"), "--lora-rank", "4"]
    main(["tune", str(source), "--data", str(path), *flags, *outputs])
    return home / "otaro", json.loads((home / "r.json").read_text())


def test_a_killed_run_of_adapters_goes_on_to_the_same_bits(source, corpus, adapted, tmp_path):
    whole = tune(source, "otaro", DENSE, LOW, corpus, tmp_path / "whole", lora=LORA)
    exact = ("step", "width", "loss", "grad_norm", "applied")
    lines = [[[r[k] for k in exact] for r in records(d)] for d in (adapted[0], tmp_path / "whole")]
    assert lines[0] == lines[1] and len(lines[0]) == 18
    both = [checkpoint.load(d)[0] for d in (adapted[0], tmp_path / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *both)
    both = [adapters_of(d) for d in (adapted[0], tmp_path / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *both)
    named = {r["name"]: r["value"] for r in adapted[1]["rows"]}
    assert whole.losses == {w: named[f"otaro, E5M{w}"] for w in range(3, 9)}
    assert whole.tuned == named["otaro, tuned"] == sum(x.size for x in jax.tree.leaves(both[0][3]))


def test_a_checkpoint_has_the_merged_weights_and_every_width_is_better(source, adapted):
    directory, report = adapted
    base, merged = (checkpoint.load(d)[0] for d in (source, directory))
    *_, adapters = adapters_of(directory)
    expected = jax.jit(LORA)(base, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    kept = jax.tree.map(lambda a, b: bool((a == b).all()), base, merged)
    assert kept["norm"]["weight"] and not kept["embed"]["weight"] and not kept["lm_head"]["weight"]
    rows = {r["name"]: r["value"] for r in report["rows"]}
    for width in range(3, 9):
        assert rows[f"otaro, E5M{width}"] < 0.9 * rows[f"untuned, E5M{width}"]
    assert 0 < rows["otaro, tuned"] < 0.5 * jaxmoe.param_count(DENSE)
    assert report["options"]["lora_rank"] == 4


def test_a_directory_belongs_to_its_adapters_and_to_the_base_under_them(
    source, corpus, adapted, tmp_path
):
    directory = tmp_path / "otaro"
    shutil.copytree(adapted[0], directory)
    arguments = ("otaro", DENSE, LOW, corpus, directory)
    for lora in (quant.Lora(rank=8), quant.Lora(rank=4, alpha=8.0), None):
        with pytest.raises(ValueError, match="another lora"):
            tune(source, *arguments, lora=lora)
    # Of the same name and step, with another matrix.
    other = tmp_path / source.name
    params = checkpoint.load(source)[0]
    params["lm_head"]["weight"] = params["lm_head"]["weight"].at[3, 5].add(0.01)
    checkpoint.save(other / "checkpoints", params, DENSE, 1)
    with pytest.raises(ValueError, match="run began with; lm_head/weight in .* differs"):
        tune(other, *arguments, lora=LORA)


def test_adapters_are_not_drawn_from_the_key_that_draws_missing_indexers(source):
    weights = Weights(source, DENSE, LOW, LORA)
    from_root = LORA.init(weights.frozen, jax.random.key(LOW.seed))
    first, again = (w.begin()["lm_head"]["weight"]["a"] for w in [weights] * 2)
    assert (first == again).all() and not (first == from_root["lm_head"]["weight"]["a"]).any()


@pytest.mark.slow
def test_a_killed_run_of_adapters_of_latent_attention_and_experts_goes_on_to_the_same_bits(
    corpus, tmp_path
):
    drawn = np.random.default_rng(0)

    def unbalanced(path, x):
        if not name_of(path).endswith("router/bias"):
            return x
        return drawn.normal(0, 0.1, x.shape).astype(np.float32)

    params = jaxmoe.init_params(MODEL, jax.random.key(0))
    base = jax.tree_util.tree_map_with_path(unbalanced, params)
    checkpoint.save(tmp_path / "source" / "checkpoints", base, MODEL, 1)
    c = dataclasses.replace(LOW, steps=6, save_every=3)
    arguments = (tmp_path / "source", "otaro", MODEL, c, corpus)

    def kill(record):
        if record["step"] == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        tune(*arguments, tmp_path / "killed", lora=LORA, on_step=kill)
    tune(*arguments, tmp_path / "killed", lora=LORA)
    tune(*arguments, tmp_path / "whole", lora=LORA)
    killed, whole = (checkpoint.load(tmp_path / d, mtp=True)[0] for d in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    both = (jax.tree_util.tree_leaves_with_path(tree) for tree in (whole, base))
    pairs = [(name_of(p), x, y) for (p, x), (_, y) in zip(*both, strict=True)]
    biases = [name for name, x, y in pairs if name.endswith("router/bias") and (x == y).all()]
    assert biases == ["mtp/0/layer/moe/router/bias", "segments/1/0/moe/router/bias"]
    moved = {name for name, x, y in pairs if not (x == y).all()}
    assert {"segments/1/0/moe/experts/down", "segments/0/0/attention/kv_a/weight"} <= moved


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "ptq", "uniform+nested"])
def test_every_method_takes_adapters(method, source, corpus, tmp_path):
    lowered = dataclasses.replace(LOW, steps=8)
    found = tune(source, method, DENSE, lowered, corpus, tmp_path, lora=LORA)
    before = score_source(source, DENSE, lowered, corpus)
    assert found.mean < before.mean and found.unquantised < before.unquantised


def test_adapters_that_do_not_fit_are_refused_before_anything_is_read(source, capsys, tmp_path):
    from jaxmoe.cli import main

    for flags, words in (
        (["--lora-rank", "0"], "rank must be at least 1; got 0."),
        (["--lora-rank", "64"], "there is none with both sides above rank=64"),
        (["--decode-tokens", "-1"], "decode_tokens must be at least 0; got -1."),
        (["--lora-alpha", "8"], "lora_alpha needs lora_rank; got 8.0 alone."),
        (["--lora-rank", "4", "--lora-alpha", "-1"], "alpha must be positive and finite; got -1.0"),
    ):
        with pytest.raises(SystemExit):
            main(["tune", str(source), "--output", str(tmp_path), *flags])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.iterdir())


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
        name in shown for name in (*methods, "untuned+nested", "E5M8", "E5M3", "mean", "tokens/s")
    )
    assert (tmp_path / "out" / "widths.png").is_file()
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {(r["method"], r["width"]): r for r in report["rows"] if "width" in r}
    untuned = ("untuned", "untuned+nested")
    assert set(rows) == {(m, w) for m in (*methods, *untuned) for w in range(3, 9)}
    assert rows["fixed:3", 3]["steps"] == 6 and rows["otaro", 3]["bytes"] == rows["ptq", 3]["bytes"]
    speeds = {r["name"]: r["value"] for r in report["rows"] if r["unit"] == "tokens/s"}
    assert len(speeds) == 7 and speeds["E5M3, decode"] > 0 and speeds["unquantised, decode"] > 0
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
    # Of adapters the weights that stay, those merged, and no more moments than they have numbers.
    memory["SC_PAGE_SIZE"] = 12
    with pytest.raises(ValueError, match=r"needs at least .* Add --lora-rank"):
        cli.tune(str(source), ("fixed:3", "otaro"), options=C)
    with pytest.raises(Interrupted):
        cli.tune(str(source), ("otaro",), options=C, lora_rank=2)
    memory["SC_PAGE_SIZE"] = 8
    with pytest.raises(ValueError, match=r"needs at least .* Choose a smaller --lora-rank"):
        cli.tune(str(source), ("otaro",), options=C, lora_rank=2)
