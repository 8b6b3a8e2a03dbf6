"""Whole runs: they learn, resume exactly, and say what is wrong."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from train.support import MODEL, REPOSITORY, RUN, losses, records, with_options, write_corpus

from jaxmoe import checkpoint
from jaxmoe.elastic.cluster.supervisor import environment
from jaxmoe.sharding import make_mesh
from jaxmoe.train import TrainConfig, train
from jaxmoe.train.loop import MAX_SKIPPED, LossNotFinite

# A run in its own process: argv is directory, corpus, steps and the step at which it signals itself (0: never).
_SCRIPT = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, "tests")
    from train.support import MODEL, with_options
    from jaxmoe.train import train

    directory, corpus, steps, signal_at = sys.argv[1:]

    def on_progress(progress):
        print(progress.step, flush=True)
        if progress.step == int(signal_at):
            os.kill(os.getpid(), signal.SIGTERM)

    options = with_options(steps=int(steps), save_every=5, keep=2)
    train(MODEL, options, directory, data=corpus, on_progress=on_progress)
""")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run: its directory and summary."""
    directory = tmp_path_factory.mktemp("run") / "first"
    seen = []
    summary = train(MODEL, RUN, directory, data=corpus, on_progress=seen.append)
    return directory, summary, seen


def start(directory, corpus, steps, signal_at=0):
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(corpus.parent / "compiled"),  # the same programs, once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(directory), str(corpus), str(steps), str(signal_at)],
        cwd=REPOSITORY,
        env=environment() | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=1200)  # against hanging; a loaded machine is slow
    assert process.returncode == 0, err
    return out.split()


def test_the_loss_falls_within_a_few_steps(run):
    _, summary, _ = run
    lines = records(summary.directory)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    assert summary.bits_per_byte == lines[-1]["bits_per_byte"] < np.log2(MODEL.vocab_size)


def test_every_step_has_one_line_and_one_call(run):
    directory, summary, seen = run
    lines = records(directory)
    assert [line["step"] for line in lines] == [*range(1, RUN.steps + 1)]
    assert [p.step for p in seen] == [*range(1, RUN.steps + 1)]
    assert len(lines[0]["load_max_over_mean"]) == 2
    for name in ("loss", "mtp_loss", "index_loss", "balance_loss", "grad_norm", "tokens_per_s"):
        assert all(np.isfinite(line[name]) for line in lines), name
    restored = checkpoint.restore(directory / "checkpoints")
    assert restored.step == RUN.steps
    assert restored.extra["corpus"]["sha256"] == summary.corpus.fingerprint["sha256"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(run, corpus, tmp_path):
    directory, _, _ = run
    train(MODEL, RUN, tmp_path / "same", data=corpus)
    assert losses(tmp_path / "same") == losses(directory)
    train(MODEL, with_options(steps=2, seed=1), tmp_path / "other", data=corpus)
    assert losses(tmp_path / "other")[0] != losses(directory)[0]


def test_a_finished_run_trains_no_further(run, corpus):
    directory, summary, _ = run
    before = losses(directory)
    again = train(MODEL, RUN, directory, data=corpus)
    assert again.step == RUN.steps and losses(directory) == before
    np.testing.assert_allclose(again.bits_per_byte, summary.bits_per_byte, rtol=1e-6)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_losses_after_sigkill_are_those_of_an_undisturbed_run(corpus, tmp_path, kills):
    steps = 10 * (kills + 1)
    calm = start(tmp_path / "calm", corpus, steps)
    assert finish(calm)[-1] == str(steps)
    rng = random.Random(0)
    for kill in range(kills):
        # Killed some steps, and some milliseconds, after it has come further than the last time.
        goal = (kill + 1) * 10 + rng.randrange(5)
        process = start(tmp_path / "killed", corpus, steps)
        for line in process.stdout:
            if int(line) >= goal:
                time.sleep(rng.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    # As if the last kill had cut a line short.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 29, "lo')
    resumed = finish(start(tmp_path / "killed", corpus, steps))
    assert int(resumed[0]) > 1, "it started over"
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")


def _saved_after_sigterm(process, directory):
    """The saved step; fails unless the process died of the signal and its last line is the saved step's."""
    _, errors = process.communicate(timeout=1200)  # see ``finish``
    assert process.returncode == -signal.SIGTERM
    step = checkpoint.latest_step(directory / "checkpoints")
    assert step is not None
    assert records(directory)[-1]["step"] == step
    assert f"signal=SIGTERM process=0 saved_step={step} " in errors
    return step


@pytest.mark.slow
def test_sigterm_saves_first(corpus, tmp_path):
    process = start(tmp_path, corpus, 100_000)
    for line in process.stdout:
        if int(line) == 3:
            process.terminate()
            break
    assert _saved_after_sigterm(process, tmp_path) >= 3


def test_sigterm_between_saving_and_the_next_step_saves_that_step(corpus, tmp_path):
    assert _saved_after_sigterm(start(tmp_path, corpus, 100_000, signal_at=3), tmp_path) == 4


@pytest.mark.slow
def test_steps_that_stay_not_finite_are_skipped_reported_and_end_the_run(corpus, tmp_path):
    options, seen = with_options(steps=40, learning_rate=1e30, save_every=1), []
    with pytest.raises(
        LossNotFinite, match=r"steps \d+ to \d+ were skipped.*learning_rate"
    ) as error:
        train(MODEL, options, tmp_path, data=corpus, on_progress=seen.append)
    assert "\n" not in str(error.value)
    skipped = [record for record in records(tmp_path) if record["skipped"]]
    assert [p.step for p in seen if p.skipped] == [record["step"] for record in skipped]
    assert len(skipped) == MAX_SKIPPED
    # What was skipped changed nothing: all that is saved is finite.
    restored = checkpoint.restore(tmp_path / "checkpoints")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.params))


def test_another_corpus_is_refused(run, tmp_path):
    other = write_corpus(tmp_path / "text")
    (other / "module_3.py").write_text("changed")
    with pytest.raises(ValueError, match="another corpus.*sha256"):
        train(MODEL, RUN, run[0], data=other)


def test_another_stage_in_the_directory_is_refused_by_name(run, corpus):
    with pytest.raises(
        ValueError, match="another training options.*stage: 'pretrain' -> 'dsa_warmup'"
    ):
        train(MODEL, dataclasses.replace(RUN, stage="dsa_warmup"), run[0], data=corpus)


def test_another_setting_is_refused_by_name_with_both_values(run, corpus):
    with pytest.raises(ValueError, match="learning_rate: 0.01 -> 0.02"):
        train(MODEL, with_options(learning_rate=0.02), run[0], data=corpus)
    with pytest.raises(ValueError, match="model config.*index_topk: 8 -> 4"):
        train(MODEL.replace(index_topk=4), RUN, run[0], data=corpus)


def test_settings_beside_the_losses_may_change(run, corpus):
    train(MODEL, with_options(eval_every=5, keep=1, probe_bytes=100), run[0], data=corpus)


def test_a_run_in_the_way_is_an_error_without_resume(run, corpus):
    with pytest.raises(ValueError, match="already holds a run"):
        train(MODEL, RUN, run[0], data=corpus, resume=False)


def test_seq_len_beyond_the_model_names_both_numbers(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"seq_len \(129\).*max_position_embeddings \(128\)"):
        train(MODEL, with_options(seq_len=129), tmp_path / "run", data=corpus)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_too_small_for_bytes_names_both_numbers(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size \(100\).*259"):
        train(MODEL.replace(vocab_size=100), RUN, tmp_path / "run", data=corpus)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("learning_rate", -1.0), ("mtp_weight", -0.1), ("keep", 0)]
)
def test_a_setting_that_makes_no_sense_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        dataclasses.replace(TrainConfig(), **{field: value})


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(corpus, tmp_path, devices):
    half = with_options(steps=6, save_every=3)
    train(MODEL, half, tmp_path, data=corpus)
    expected = losses(tmp_path)
    # Lose the second half, and go on with four devices.
    for step in (6,):
        os.rename(tmp_path / "checkpoints" / str(step), tmp_path / "lost")
    mesh = make_mesh(data=2, expert=2, devices=devices[:4])
    summary = train(MODEL, half, tmp_path, data=corpus, mesh=mesh)
    assert losses(tmp_path)[:3] == expected[:3]
    ours = [float(line[1]) for line in losses(tmp_path)]
    np.testing.assert_allclose(ours, [float(line[1]) for line in expected], rtol=1e-4)
    assert len(jax.tree.leaves(summary.params)[0].sharding.device_set) == 4
    # What was saved is a copy on the host; the file tells where the state was.
    metadata = json.loads((tmp_path / "checkpoints" / "6" / "metadata.json").read_text())
    assert metadata["topology"]["mesh"] == {"data": 2, "expert": 2, "tensor": 1}
