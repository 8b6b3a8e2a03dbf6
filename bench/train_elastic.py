"""What does the loss of a rank cost a training run, beside the same run stopped and started again from its checkpoint?

    python -m bench.train_elastic --json bench/results/train_elastic.json

The demo's model and text on processes. A rank, another one each time, gets SIGKILL in the middle of a step; it is started again
and joins. The baseline loses all ranks at the same place and is started again at once by the same command: its compiled programs and
its checkpoint, as old as the other's snapshot, are on disk.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import statistics
import tempfile
import threading
import time

from bench._harness import finish, parser
from jaxmoe.report import median_row
from jaxmoe.train import TrainConfig, demo_config
from jaxmoe.train.elastic import ElasticOptions, RanksLost, train_elastic

_EVERY = 4  # steps between snapshots, and in the baseline between checkpoints
_INTO = 0.4  # of a step, when the signal comes


class Done(Exception):
    """All rounds are over."""


class Faults:
    """Kills ranks while a run goes on, and takes the times.

    Args:
      rounds: faults.
      everyone: kill all ranks at once.
    """

    def __init__(self, rounds: int, *, everyone: bool = False):
        self._rounds, self._everyone = rounds, everyone
        self._pids: dict[int, int] = {}
        self._last, self._step_s = 0.0, []
        self._goal: int | None = None
        self.killed: float | None = None
        self.lost, self.joined = [], []
        self.to_next_step, self.to_same_step, self.redone = [], [], []

    def on_event(self, event):
        self._pids = event.pids
        if event.type == "lost":
            self.lost.append(event)
        elif event.type == "joined":
            self.joined.append(event)
        self._last = 0.0

    def on_progress(self, progress):
        now = time.monotonic()
        if self.killed is not None and self._goal is None:
            self._first_after(progress.step, now)
        if self._goal is not None and progress.step >= self._goal:
            self.to_same_step.append(now - self.killed)
            self.killed = self._goal = None
        if self._last and self.killed is None:
            self._step_s.append(now - self._last)
        self._last = now
        whole = len(self.joined) == len(self.lost)
        if self.killed is None and whole and len(self.to_next_step) == self._rounds:
            raise Done
        # As far behind the snapshot as can be: the dearest moment.
        if (
            self.killed is None
            and whole
            and progress.step % _EVERY == _EVERY - 1
            and progress.step > _EVERY
        ):
            self._at = progress.step
            threading.Timer(_INTO * statistics.median(self._step_s), self._kill).start()

    def _first_after(self, step, now):
        self.to_next_step.append(now - self.killed)
        self.redone.append(self._at + 1 - step)
        self._goal = self._at + 1

    def _kill(self):
        self.killed = time.monotonic()
        victims = list(self._pids) if self._everyone else [len(self.lost) % len(self._pids)]
        for rank in victims:
            os.kill(self._pids[rank], signal.SIGKILL)


def _train(faults: Faults, run: TrainConfig, model, options: ElasticOptions, folder) -> None:
    try:
        train_elastic(
            model, run, folder, options=options, on_progress=faults.on_progress, on_event=faults.on_event,
        )  # fmt: skip
    except Done:
        pass


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--restarts", type=int, default=3, help="rounds of the baseline")
    options.add_argument(
        "--programs", help="folder of compiled programs, so that a second run compiles nothing"
    )
    args = options.parse_args()
    model, run = demo_config()
    run = dataclasses.replace(run, steps=100_000, warmup_steps=40, seed=args.seed, save_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        programs = args.programs or str(pathlib.Path(folder) / "programs")
        elastic = ElasticOptions(ranks=args.ranks, snapshot_every=_EVERY, programs=programs)
        faults = Faults(args.rounds)
        _train(faults, run, model, elastic, f"{folder}/elastic")
        base = Faults(args.restarts, everyone=True)
        saving = dataclasses.replace(run, save_every=_EVERY)
        for _ in range(args.restarts + 1):
            with contextlib.suppress(RanksLost):
                _train(base, saving, model, elastic, f"{folder}/restart")
    rows = [
        median_row("step, undisturbed", faults._step_s, "s"),
        median_row("SIGKILL to the next step done", faults.to_next_step, "s"),
        median_row("SIGKILL until as far as before", faults.to_same_step, "s"),
        median_row("of which stood still in the controller", [e.seconds for e in faults.lost], "s"),
        median_row("steps redone", faults.redone, "steps"),
        median_row("pause while a rank joins", [e.seconds for e in faults.joined], "s"),
        median_row("of which the snapshot", [e.phases["copy"] for e in faults.joined], "s"),
        median_row("programs compiled while recovering", [e.compiled for e in faults.lost + faults.joined], "programs"),
        median_row("restart: SIGKILL to the next step done", base.to_next_step, "s"),
        median_row("restart: SIGKILL until as far as before", base.to_same_step, "s"),
        median_row("restart: steps redone", base.redone, "steps"),
    ]  # fmt: skip
    ratio = statistics.median(base.to_next_step) / statistics.median(faults.to_next_step)
    finish("train_elastic", rows, {"restart_over_recovery": ratio}, args.json)


if __name__ == "__main__":
    main()
