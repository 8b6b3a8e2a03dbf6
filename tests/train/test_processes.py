"""Runs of several processes, by the command line: as one device, through signals to one of them, and through its death."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from train.support import MODEL, REPOSITORY, losses, records, write_corpus

from jaxmoe import checkpoint
from jaxmoe.train.processes import ProcessLost, with_others
from jaxmoe.train.signals import Stop, agree, take_course

WAIT_S = 500  # a hang is a failure; a loaded machine is slow
# One sparse layer: what is tested is not the model.
SMALL = MODEL.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the corpus, the model and the compiled programs."""
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder / "text")
    (folder / "small.json").write_text(json.dumps(SMALL.to_hf()))
    return folder


STARTED = []


@pytest.fixture(autouse=True)
def no_orphans():
    """Also after a failure no process stays."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def command(folder, output, steps, more="", devices=1):
    """``jaxmoe train``, in a process of its own."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    options = f"--steps {steps} --batch-size 4 --seq-len 32 --eval-every 1000 --eval-bytes 1024"
    words = f"train --model {folder / 'small.json'} --output {output} --data {folder / 'text'} {options} {more}"
    process = subprocess.Popen(
        [sys.executable, "-c", "from jaxmoe.cli import main; main()", *words.split()],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def both(folder, output, steps, mesh, devices=1):
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    mesh = f"{mesh} --coordinator-address {address} --num-processes 2"
    each = (f"{mesh} --process-id {i}" for i in range(2))
    return [command(folder, output, steps, more, devices) for more in each]


def finish(*processes):
    """(statuses, standard outputs, standard errors) when all have ended."""
    written = [process.communicate(timeout=WAIT_S) for process in processes]
    return [p.returncode for p in processes], *zip(*written, strict=True)


def until_step(output, step, processes):
    """Returns when a run has done a step."""
    end = time.monotonic() + WAIT_S
    path = output / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < end
        assert [p.poll() for p in processes] == [None, None], finish(*processes)
        time.sleep(0.01)


@pytest.mark.slow
def test_several_processes_train_as_one_device_does(folder, tmp_path):
    """Two processes of two devices each, and one device."""
    mesh = "--data-parallel 2 --expert-parallel 2"
    codes, outputs, errors = finish(*both(folder, tmp_path / "both", 4, mesh, devices=2))
    assert codes == [0, 0], errors
    silent = [line for line in outputs[1].splitlines() if not line.startswith("[Gloo]")]
    assert not silent, "only process 0 speaks"
    codes, _, errors = finish(command(folder, tmp_path / "alone", 4))
    assert codes == [0], errors
    ours, alone = ([r["loss"] for r in records(tmp_path / name)] for name in ("both", "alone"))
    np.testing.assert_allclose(ours, alone, rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_saves_and_ends_all_and_a_killed_one_ends_the_other(folder, tmp_path):
    """Losses are those of a run that nothing has happened to."""
    run, calm = tmp_path / "run", tmp_path / "calm"

    def start(output):
        return both(folder, output, 60, "--data-parallel 2")

    codes, _, errors = finish(*start(calm))
    assert codes == [0, 0], errors
    # The second gets the signal, both save and end by it.
    processes = start(run)
    until_step(run, 3, processes)
    processes[1].terminate()
    codes, _, errors = finish(*processes)
    assert codes == [-signal.SIGTERM] * 2, errors
    saved = checkpoint.latest_step(run / "checkpoints")
    assert saved is not None and records(run)[-1]["step"] == saved >= 3
    assert all(f"signal=SIGTERM process=1 saved_step={saved}" in error for error in errors)
    # The second is killed: the first has nobody to compute with, and says so.
    processes = start(run)
    until_step(run, saved + 2, processes)
    processes[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(*processes)
    assert codes == [1, -signal.SIGKILL], errors
    assert time.monotonic() - began < 60  # before JAX's heartbeat
    assert "error: process 0 of 2 ends because another is gone" in errors[0]
    assert f"Step {saved} is saved" in errors[0] and "Traceback" not in errors[0]
    codes, _, errors = finish(*start(run))
    assert codes == [0, 0], errors
    assert losses(run) == losses(calm)


@pytest.mark.parametrize(
    ("received", "stop"),
    [
        ([[], []], None),
        ([[], [signal.SIGTERM]], Stop(signal.SIGTERM, 1)),
        ([[signal.SIGINT], []], Stop(signal.SIGINT, 0)),
        ([[signal.SIGINT], [signal.SIGTERM]], Stop(signal.SIGTERM, 1)),
    ],
)
def test_a_signal_to_any_process_ends_all_alike(monkeypatch, received, stop):
    every = [max(numbers, default=0) for numbers in received]

    def gather(own):
        assert own in every
        return np.asarray(every, np.int32)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert [agree(own) for own in received] == [stop, stop]


def test_no_process_ends_by_a_signal_before_all_are_ready(monkeypatch):
    done = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("all are here"))
    monkeypatch.setattr(signal, "raise_signal", done.append)
    take_course(signal.SIGTERM)
    take_course(signal.SIGINT)  # an exception, with which the process goes on to its usual end
    assert done == ["all are here", signal.SIGTERM, signal.SIGINT]


def test_only_an_error_of_communication_says_that_another_process_is_gone(monkeypatch):
    lost = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nmore"
    for processes, message, becomes in (
        (2, lost, ProcessLost),
        (2, "RESOURCE_EXHAUSTED: out of memory", RuntimeError),
        (1, lost, RuntimeError),
    ):
        monkeypatch.setattr(jax, "process_count", lambda count=processes: count)
        with pytest.raises(becomes) as error, with_others(lambda: 7):
            raise RuntimeError(message)
        assert type(error.value) is becomes
        if becomes is ProcessLost:
            assert "(UNKNOWN: Gloo all-reduce failed: Connection closed by peer)" in str(
                error.value
            )
            assert "Step 7 is saved" in str(error.value) and "\n" not in str(error.value)
