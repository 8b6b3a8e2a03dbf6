"""A run's record: ``metrics.jsonl``, and its numbers as TensorBoard events."""

import json
import logging
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def drop_after(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Removes metric lines past ``step``, and a line that a kill cut short; returns what is left."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append((line, record))
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line, _ in kept))
    temporary.replace(path)
    return [record for _, record in kept]


class Metrics:
    """Writes one line, and one event, per step; a step that is done again has those of the last time.

    Events are written where ``tensorboard`` is installed (extra "tensorboard"), into the run's directory. A run that had none gets
    them for all its lines. What is written is with the operating system when ``write`` returns, so that nothing of a
    step is missing whose checkpoint is written afterwards.

    Args:
      directory: of the run.
      step: of the state that the run goes on from; later lines and events do not count any more.
    """

    def __init__(self, directory: pathlib.Path, step: int):
        self._path = directory / METRICS
        kept = drop_after(self._path, step)
        self._file = self._path.open("a")
        is_new = not any(directory.glob("events.out.tfevents.*"))
        self._events = _Events.open(directory)
        if self._events is not None and is_new:
            for record in kept:
                self._events.write(record)
        self._restart(step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, record: dict[str, Any]) -> None:
        """Adds a step's record; a number that is not finite becomes null, since JSON has no NaN."""
        record = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in record.items()
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(record)
            self._events.flush()

    def drop_after(self, step: int) -> None:
        """Takes back what was written of later steps, which are done again."""
        self._file.close()
        drop_after(self._path, step)
        self._file = self._path.open("a")
        self._restart(step)

    def _restart(self, step: int) -> None:
        if self._events is not None:
            self._events.restart(step + 1)
            self._events.flush()


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name: of a list, such as one figure per layer, one by one."""
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            yield name, float(value)
        elif isinstance(value, list) and all(isinstance(x, int | float) for x in value):
            yield from ((f"{name}/{i + 1}", float(x)) for i, x in enumerate(value))


class _Events:
    """An event file, written with TensorBoard's own classes."""

    def __init__(self, writer: Any, event_pb2: Any, summary_pb2: Any):
        self._writer, self._event, self._summary = writer, event_pb2, summary_pb2
        self.flush, self.close = writer.flush, writer.close

    @classmethod
    def open(cls, directory: pathlib.Path) -> "_Events | None":
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            logger.info('events=none reason="install jaxmoe[tensorboard]"')
            return None
        return cls(EventFileWriter(str(directory)), event_pb2, summary_pb2)

    def write(self, record: dict[str, Any]) -> None:
        values = [
            self._summary.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars(record)
        ]
        summary = self._summary.Summary(value=values)
        event = self._event.Event(step=record["step"], summary=summary, wall_time=time.time())
        self._writer.add_event(event)

    def restart(self, step: int) -> None:
        """Readers forget what they have read of this step and later ones."""
        log = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step, session_log=log, wall_time=time.time()))
