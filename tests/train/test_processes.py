"""Runs of several processes, by the command line: as one device, through signals to one of them, and through its death."""

import atexit
import json
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
from jaxmoe.elastic.cluster.supervisor import environment
from jaxmoe.train.devices import DeviceOptions
from jaxmoe.train.processes import ProcessLost, status_of, with_others
from jaxmoe.train.signals import Stop, Stopped, agree, deferred_signals, take_course

WAIT_S = 500  # a hang is a failure; a loaded machine is slow
ENDLESS = 100_000  # steps: a run that is interrupted must not finish first
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
    own = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    options = f"--steps {steps} --batch-size 4 --seq-len 32 --eval-every 1000 --eval-bytes 1024"
    words = f"train --model {folder / 'small.json'} --output {output} --data {folder / 'text'} {options} {more}"
    process = subprocess.Popen(
        [sys.executable, "-c", "from jaxmoe.cli import main; main()", *words.split()],
        cwd=REPOSITORY,
        env=environment(devices) | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def free_address():
    """Where process 0 can be met."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def both(folder, output, steps, mesh, devices=1):
    """Two processes of one run."""
    mesh = f"{mesh} --coordinator-address {free_address()} --num-processes 2"
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
    """Losses are those of a run to which nothing has happened before."""
    run, calm = tmp_path / "run", tmp_path / "calm"

    def start(output):
        return both(folder, output, ENDLESS, "--data-parallel 2")

    def saved_of(output):
        return checkpoint.latest_step(output / "checkpoints")

    def stop(output, step):
        """Trains to a step at least; the second gets the signal, both save and end by it."""
        processes = start(output)
        until_step(output, step, processes)
        processes[1].terminate()
        codes, _, errors = finish(*processes)
        assert codes == [-signal.SIGTERM] * 2, errors
        saved = saved_of(output)
        assert saved is not None and records(output)[-1]["step"] == saved >= step
        assert all(f"signal=SIGTERM process=1 saved_step={saved}" in error for error in errors)
        return saved

    saved = stop(run, 3)
    # The second is killed: the first has nobody to compute with, and says so.
    processes = start(run)
    until_step(run, saved + 2, processes)
    processes[1].kill()
    codes, _, errors = finish(*processes)
    assert codes == [1, -signal.SIGKILL], errors
    assert "error: process 0 of 2 ends because another is gone" in errors[0]
    saved = saved_of(run)
    assert f"Step {saved} is saved" in errors[0] and "Traceback" not in errors[0]
    stop(run, saved + 4), stop(calm, saved + 4)
    common = min(map(saved_of, (run, calm)))
    assert losses(run)[:common] == losses(calm)[:common]


ONE_FAILS = """
import sys
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxmoe.train.devices import DeviceOptions
address, number, fails = sys.argv[1], *map(int, sys.argv[2:])
with DeviceOptions(coordinator_address=address, num_processes=2, process_id=number).connected():
    process_allgather(np.zeros(1))
    if number == fails:
        raise OSError("no space left")
    process_allgather(np.zeros(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_process_ends_the_other(fails):
    """Long before the 300 s for which JAX lets a process wait for the others at its end."""
    address = free_address()
    for number in range(2):
        words = [sys.executable, "-c", ONE_FAILS, address, str(number), str(fails)]
        STARTED.append(subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True))
    processes = STARTED[-2:]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert processes[fails].returncode == 1, errors
    assert "OSError: no space left" in errors[fails]
    assert processes[1 - fails].returncode != 0, errors


@pytest.mark.parametrize(
    ("error", "registered"), [(Stopped(), []), (KeyboardInterrupt(), [130]), (OSError(), [1])]
)
def test_only_who_is_stopped_together_with_the_others_waits_for_them(
    monkeypatch, error, registered
):
    statuses = []
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(atexit, "register", lambda function, status: statuses.append(status))
    with pytest.raises(type(error)), DeviceOptions().connected():
        raise error
    assert statuses == registered


def test_an_error_decides_the_status():
    for error, status in (
        (OSError(), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(3), 3),
        (SystemExit("words"), 1),
    ):
        assert status_of(error) == status


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


@pytest.fixture
def ignored_interrupts():
    """Ctrl-C is ignored, as in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored(ignored_interrupts):
    with deferred_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert not received and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_who_ignores_a_signal_that_another_process_has_received_ends_too(ignored_interrupts):
    with pytest.raises(Stopped):
        take_course(signal.SIGINT)


def test_only_an_error_of_communication_says_that_another_process_is_gone(monkeypatch):
    lost = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nmore"
    for processes, message, becomes in (
        (2, lost, ProcessLost),
        (2, "RESOURCE_EXHAUSTED: out of memory\nbarrier", RuntimeError),
        (2, "runs/gloo-test holds a run: choose another directory.", ValueError),
        (1, lost, RuntimeError),
    ):
        monkeypatch.setattr(jax, "process_count", lambda count=processes: count)
        with pytest.raises(becomes) as error, with_others(lambda: 7):
            raise (RuntimeError if becomes is ProcessLost else becomes)(message)
        assert type(error.value) is becomes
        if becomes is ProcessLost:
            assert "(UNKNOWN: Gloo all-reduce failed: Connection closed by peer)" in str(
                error.value
            )
            assert "Step 7 is saved" in str(error.value) and "\n" not in str(error.value)
