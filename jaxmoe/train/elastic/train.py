"""``train`` on processes that may die."""

import os
import pathlib
import time
from collections.abc import Callable

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.data import DataOptions
from jaxmoe.train.elastic.events import Event
from jaxmoe.train.elastic.options import ElasticOptions
from jaxmoe.train.elastic.run import ElasticRun
from jaxmoe.train.loop import Progress, Run, Summary, corpus_of, train
from jaxmoe.train.signals import deferred_signals, take_course


def train_elastic(
    config: ModelConfig,
    train_config: TrainConfig,
    directory: str | os.PathLike[str],
    *,
    data: DataOptions | str | os.PathLike[str] | None = None,
    options: ElasticOptions = ElasticOptions(),
    on_progress: Callable[[Progress], None] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Summary:
    """``train`` on ranks that are processes of their own and may die: the run goes on without them, and with them again.

    Files are those of ``train``, which can go on with such a run and the other way round, and ``events.jsonl``, one JSON
    object per change of the ranks. A step that is done again has one line in ``metrics.jsonl``, that of the last time.
    SIGTERM and Ctrl-C save first.

    Args:
      config, train_config, directory, data: as of ``train``.
      options: ranks and limits.
      on_progress: called after every step, so again after steps that are done again.
      on_event: called after every change of the ranks.

    Returns:
      As ``train``.

    Raises:
      RanksLost: when no rank is left.
      RankFailed: if the ranks do not start.
      ValueError, LossNotFinite: as of ``train``.
    """
    train_config.check(config)
    directory = pathlib.Path(directory)
    data = data if isinstance(data, DataOptions) else DataOptions(data)
    corpus = corpus_of(config, directory, data)
    run = Run(config, train_config, directory, corpus, None)
    if (checkpoint.latest_step(run.checkpoints) or 0) >= train_config.steps:
        return train(config, train_config, directory, data=data)  # complete already: it only scores
    directory.mkdir(parents=True, exist_ok=True)
    corpus.put_tokenizer(directory)
    this = ElasticRun(run, data, options, on_event)
    with this.processes():
        this.start()
        began = time.perf_counter()
        with deferred_signals() as received:
            record = this.train(received, on_progress)
    for number in received:  # saved: now they take their usual course
        take_course(number)
    # Stopped before there was anything more to save, it is as it began.
    state = run.start() if this.state is None else this.state
    return run.summary(state, record, time.perf_counter() - began)
