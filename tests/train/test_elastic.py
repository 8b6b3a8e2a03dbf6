"""Training on real processes that are killed, stopped and started again: the run is that of an undisturbed one."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from train.support import MODEL, REPOSITORY, losses, records, with_options, write_corpus

from jaxmoe import checkpoint
from jaxmoe.elastic.cluster.messages import Fault
from jaxmoe.elastic.cluster.supervisor import environment
from jaxmoe.train import DataOptions, load_corpus, loop, train
from jaxmoe.train.elastic import ElasticOptions, RanksLost, train_elastic
from jaxmoe.train.elastic import run as run_module
from jaxmoe.train.elastic.messages import StepValue
from jaxmoe.train.loop import Run

# One sparse layer: what is tested compiles for three numbers of ranks.
SMALL = MODEL.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
WAIT_S = 240  # a hang is a failure


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("programs"))


class Watched:
    """An elastic run, and what happens in it.

    Args:
      on_step: called after every step with this and the step.
    """

    def __init__(self, directory, corpus, programs, on_step=lambda run, step: None, *, ranks=3, config=SMALL, snapshot_every=5, silence_s=5.0, respawn=False, **changes):  # fmt: skip
        self.directory, self.events, self.seen = directory, [], []
        self._on_step, self._until = on_step, time.monotonic() + WAIT_S
        elastic = ElasticOptions(
            ranks=ranks,
            snapshot_every=snapshot_every,
            silence_s=silence_s,
            respawn=respawn,
            programs=programs,
        )
        original = run_module.ElasticRun.start

        def start(run):
            self.run = run
            original(run)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module.ElasticRun, "start", start)
            self.summary = train_elastic(
                config,
                with_options(**changes),
                directory,
                data=corpus,
                options=elastic,
                on_progress=self._progress,
                on_event=self.events.append,
            )
        assert not any(map(_lives, self.pids))

    def _progress(self, progress):
        assert time.monotonic() < self._until
        self.seen.append(progress.step)
        self._on_step(self, progress.step)

    @property
    def pids(self):
        return {pid for event in self.events for pid in event.pids.values()}

    def member(self, rank):
        return self.run._team.members[rank]

    def signal(self, number, *ranks):
        for rank in ranks:
            os.kill(self.member(rank).process.pid, number)

    def happened(self, kind):
        return [event for event in self.events if event.type == kind]


def _lives(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _steps(directory):
    return [record["step"] for record in records(directory)]


def _at(step, act):
    """``act`` once, after a step."""
    done = []

    def on_step(run, now):
        if now == step and not done:
            done.append(now)
            act(run)

    return on_step


def test_a_step_on_ranks_has_the_utilisation_of_an_ordinary_one(corpus, tmp_path, monkeypatch):
    run = Run(SMALL, with_options(), tmp_path, load_corpus(corpus), None)
    elastic = run_module.ElasticRun(run, DataOptions(corpus), ElasticOptions(), lambda event: None)
    metrics = {"loss": np.float32(1.0), "skipped": np.float32(0.0)}
    answers = {
        rank: SimpleNamespace(value=StepValue(metrics, {"bits_per_byte": 2.0}, scoring_s, 0))
        for rank, scoring_s in enumerate((0.5, 0.4))
    }
    elastic._team = SimpleNamespace(epoch=0, tell=lambda _: None, gather=lambda *_: answers)
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(loop, "peak_flops", lambda dtype: run.flops)
    record = elastic._advance()
    # 2.5 s, of which the slowest has scored half a second.
    assert (record["seconds"], record["mfu"], record["ranks"]) == (2.0, 0.5, 2)
    assert record == run.record(1, metrics, 2.0) | {"ranks": 2, "bits_per_byte": 2.0}


def test_a_run_goes_back_to_what_it_has_saved_itself(corpus, tmp_path):
    run = Run(SMALL, with_options(), tmp_path, load_corpus(corpus), None)
    elastic = run_module.ElasticRun(run, DataOptions(corpus), ElasticOptions(), lambda event: None)
    assert elastic._read() == 0
    # Seven steps later all arrays are others.
    later = jax.tree.map(lambda x: x + 7, run.start())
    run.save(later)
    assert elastic._read() == 7
    jax.tree.map(np.testing.assert_array_equal, run.start(), later)


@pytest.fixture(scope="module")
def killed(corpus, programs, tmp_path_factory):
    """A run whose rank 0 dies in the middle of step 13 and is back before the end."""

    def on_step(run, step):
        if step == 12 and not run.happened("lost"):
            # It dies with the collectives of its next step under way.
            run.member(0).send(Fault("step", "kill", 0.005))
        elif run.happened("lost") and not run.happened("joined"):
            time.sleep(0.5)

    directory = tmp_path_factory.mktemp("killed")
    changes = {"steps": 150, "save_every": 10, "keep": 100, "eval_every": 60}
    return Watched(directory, corpus, programs, on_step, respawn=True, **changes)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The same run on one device."""
    directory = tmp_path_factory.mktemp("alone")
    train(SMALL, with_options(steps=150, eval_every=60), directory, data=corpus)
    return directory


@pytest.mark.slow
def test_a_killed_rank_is_done_without_and_taken_in_again(killed):
    started, lost, joined = killed.events
    assert (started.type, lost.type, joined.type) == ("started", "lost", "joined")
    assert started.compiled == 6  # a step and a score for each number of ranks
    assert (lost.ranks, lost.source, lost.compiled) == ((0,), "memory", 0)
    assert (lost.step, lost.redone, lost.mesh) == (10, 2, {"data": 1, "expert": 2})
    assert (joined.redone, joined.compiled, joined.active) == (0, 0, (0, 1, 2))
    assert joined.mesh == {"data": 3, "expert": 1}
    assert all(0 <= r["mfu"] < 1 for r in records(killed.directory))
    by_ranks = {step: r["ranks"] for step, r in enumerate(records(killed.directory), 1)}
    assert by_ranks == {s: 2 if lost.step < s <= joined.step else 3 for s in range(1, 151)}


@pytest.mark.slow
def test_its_losses_are_those_of_one_device(killed, alone):
    assert _steps(killed.directory) == [*range(1, 151)]
    for name in ("loss", "index_loss", "grad_norm"):
        ours, theirs = ([r[name] for r in records(d)] for d in (killed.directory, alone))
        # Sums in another order; Adam carries the difference along, and doubles it about every ten steps.
        np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-3, err_msg=name)
    ends = [records(d)[-1]["bits_per_byte"] for d in (killed.directory, alone)]
    assert abs(ends[0] - ends[1]) < 0.05 * ends[1]


@pytest.mark.slow
def test_after_the_loss_they_are_bit_for_bit_those_of_the_survivors_from_that_step(
    killed, corpus, programs, tmp_path
):
    lost, joined = killed.events[1:]
    shutil.copytree(killed.directory / "checkpoints" / "10", tmp_path / "checkpoints" / "10")
    last = min(joined.step, 40)

    def stop(run):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Watched(tmp_path, corpus, programs, _at(last, stop), ranks=2, steps=150)
    assert last > lost.step
    assert losses(tmp_path) == losses(killed.directory)[lost.step : last]


@pytest.mark.slow
def test_one_device_goes_on_where_an_elastic_run_has_saved(killed, alone, corpus, tmp_path):
    shutil.copytree(killed.directory / "checkpoints" / "10", tmp_path / "checkpoints" / "10")
    train(SMALL, with_options(steps=150, eval_every=60), tmp_path, data=corpus)
    ours, theirs = ([r["loss"] for r in records(d)] for d in (tmp_path, alone))
    np.testing.assert_allclose(ours[:5], theirs[10:15], rtol=1e-3)


def _run(directory, corpus, programs, on_step, **changes):
    return Watched(directory, corpus, programs, on_step, **({"steps": 30} | changes))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """Thirty steps on one device."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(SMALL, with_options(steps=30), directory, data=corpus)
    return directory


def _same_course(directory, other):
    ours, theirs = ([r["loss"] for r in records(d)] for d in (directory, other))
    assert _steps(directory) == _steps(other)
    np.testing.assert_allclose(ours, theirs, rtol=2e-2)  # see above


@pytest.mark.slow
def test_a_stopped_rank_counts_as_lost_and_is_fenced(undisturbed, corpus, programs, tmp_path):
    stop = _at(12, lambda run: run.signal(signal.SIGSTOP, 1))
    run = _run(tmp_path, corpus, programs, stop, silence_s=2.0)
    (lost,) = run.happened("lost")
    assert (lost.ranks, lost.source) == ((1,), "memory")
    assert not _lives(run.events[0].pids[1])
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_ranks_lost_at_once(undisturbed, corpus, programs, tmp_path):
    kill = _at(13, lambda run: run.signal(signal.SIGKILL, 0, 2))
    run = _run(tmp_path, corpus, programs, kill)
    # As one loss, or the second one noticed while recovering from the first.
    assert sorted(r for event in run.happened("lost") for r in event.ranks) == [0, 2]
    assert run.events[-1].active == (1,) and run.events[-1].source == "memory"
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_loss_while_recovering_from_a_loss(undisturbed, corpus, programs, tmp_path):
    def act(run):
        run.member(2).send(Fault("install", "kill"))
        run.signal(signal.SIGKILL, 0)

    run = _run(tmp_path, corpus, programs, _at(13, act))
    (lost,) = run.happened("lost")
    assert (lost.ranks, lost.active, lost.step) == ((0, 2), (1,), 10)
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_what_no_survivor_holds_comes_from_the_checkpoint(undisturbed, corpus, programs, tmp_path):
    # Four ranks split the experts: 0 keeps its own and those of 1, and so on. Without 1 and 2 nobody has those of 2.
    kill = _at(18, lambda run: run.signal(signal.SIGKILL, 1, 2))
    run = _run(tmp_path, corpus, programs, kill, ranks=4, save_every=7)
    lost = run.happened("lost")[-1]
    assert lost.active == (0, 3) and lost.mesh == {"data": 1, "expert": 2}
    assert (lost.source, lost.step) == ("checkpoint", 14)
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_one_of_four_ranks_is_put_together_from_its_neighbours_memory(
    undisturbed, corpus, programs, tmp_path
):
    kill = _at(18, lambda run: run.signal(signal.SIGKILL, 3))
    run = _run(tmp_path, corpus, programs, kill, ranks=4)
    (lost,) = run.happened("lost")
    assert (lost.source, lost.mesh) == ("memory", {"data": 3, "expert": 1})
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_without_ranks_it_says_what_to_go_on_from_and_does(undisturbed, corpus, programs, tmp_path):
    kill = _at(18, lambda run: run.signal(signal.SIGKILL, 0, 1))
    with pytest.raises(RanksLost, match="all ranks are lost at step.*Step 14 is saved; run the command again"):  # fmt: skip
        _run(tmp_path, corpus, programs, kill, ranks=2, save_every=7)
    _run(tmp_path, corpus, programs, lambda run, step: None, ranks=2, save_every=7)
    _same_course(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_rank_that_dies_while_joining_costs_nothing(undisturbed, corpus, programs, tmp_path):
    def on_step(run, step):
        if step == 12 and not run.happened("lost"):
            run.signal(signal.SIGKILL, 1)
        elif run.happened("lost") and not run.happened("joined"):
            if len(run.happened("lost")) == 1:
                run.run._supervisor.inject(1, Fault("install", "kill"))
            time.sleep(1.0)

    run = _run(tmp_path, corpus, programs, on_step, ranks=2, respawn=True, steps=100)
    kinds = [event.type for event in run.events]
    assert kinds == ["started", "lost", "lost", "joined"]
    assert _steps(tmp_path) == [*range(1, 101)]


@pytest.mark.slow
def test_a_mesh_of_two_axes_loses_ranks_and_takes_them_in_again(corpus, programs, tmp_path):
    # Rows and columns communicate on their own; none of them may have been used before.
    def on_step(run, step):
        losses = len(run.happened("lost"))
        if losses > len(run.happened("joined")):
            time.sleep(1.0)
        elif step >= 6 and losses < 3:
            run.signal(signal.SIGKILL, losses)

    six = SMALL.replace(n_routed_experts=6)
    changes = {"ranks": 4, "config": six, "respawn": True, "steps": 150}
    run = _run(tmp_path, corpus, programs, on_step, **changes)
    assert [event.type for event in run.events] == ["started", *["lost", "joined"] * 3]
    assert [event.mesh["data"] for event in run.events] == [2, *[1, 2] * 3]
    assert _steps(tmp_path) == [*range(1, 151)]


# -- the command -----------------------------------------------------------------------------------


def _command(directory, corpus, programs):
    """``jaxmoe train --elastic`` on a run without end."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from train.test_elastic import SMALL\n"
        "from train.support import with_options\n"
        "from jaxmoe.train.elastic import ElasticOptions, train_elastic\n"
        "directory, corpus, programs = sys.argv[1:]\n"
        "if __name__ == '__main__':\n"
        "    train_elastic(SMALL, with_options(steps=100000), directory, data=corpus,\n"
        "        options=ElasticOptions(ranks=2, programs=programs),\n"
        "        on_progress=lambda p: print(p.step, flush=True),\n"
        "        on_event=lambda e: print('pids', *e.pids.values(), flush=True))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory), str(corpus), programs],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def _until_step(process, step):
    """The pids of its ranks, once it has come to a step."""
    for line in process.stdout:
        if line.startswith("pids"):
            pids = [int(pid) for pid in line.split()[1:]]
        elif int(line) >= step:
            return pids
    raise AssertionError(f"ended with {process.wait()}")


def _end(process, pids):
    process.communicate(timeout=60)
    until = time.monotonic() + 30
    while any(map(_lives, pids)):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.05)
    return process.returncode


@pytest.mark.slow
def test_sigterm_saves_and_sigkill_leaves_no_orphan(corpus, programs, tmp_path):
    process = _command(tmp_path, corpus, programs)
    pids = _until_step(process, 4)
    process.terminate()
    assert _end(process, pids) == -signal.SIGTERM
    saved = checkpoint.latest_step(tmp_path / "checkpoints")
    assert saved is not None and saved == _steps(tmp_path)[-1] >= 4
    process = _command(tmp_path, corpus, programs)
    pids = _until_step(process, saved + 1)
    process.kill()
    assert _end(process, pids) == -signal.SIGKILL
    assert _steps(tmp_path)[: saved + 1] == [*range(1, saved + 2)]
