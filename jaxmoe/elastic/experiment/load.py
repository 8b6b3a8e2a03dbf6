"""A closed loop of clients on an engine, and what the same requests give where nothing happens."""

import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Sequence

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.engine.requests import Chunk
from jaxmoe.engine.stream import Stream
from jaxmoe.params import Params

_AGAIN_AFTER_S = 0.2  # a client whose request ended with an error waits so long before its next


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that clients may send."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclasses.dataclass
class Record:
    """What a client has seen of a request; times by ``time.monotonic()``.

    Attributes:
      ask: which of the workload's requests.
      began: when it was sent.
      tokens, times: what came, and when.
      ends: how often it has ended.
      ended: when it did.
      reason, error: with which finish reason, and error if that was one.
      cancelled: whether its client gave it up.
    """

    ask: int
    began: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    ends: int = 0
    ended: float | None = None
    reason: str | None = None
    error: str | None = None
    cancelled: bool = False


def workload(config: ModelConfig, longest: int, count: int = 48, seed: int = 0) -> list[Ask]:
    """Requests of all sorts: short and long prompts, half of which begin alike; greedy, and seeded draws.

    Args:
      config: the model.
      longest: tokens that a request may have, prompt included.
      count: how many.
      seed: of the prompts.
    """
    rng = np.random.default_rng(seed)
    vocabulary = min(256, config.vocab_size)
    beginnings = [rng.integers(0, vocabulary, longest // 4).tolist() for _ in range(2)]
    ways = [{}, {}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}]
    asks = []
    for i in range(count):
        new = int(rng.integers(longest // 8, longest // 3 + 1))
        begin = beginnings[i // 2 % 2][: int(rng.integers(1, longest // 4 + 1))] if i % 2 else []
        own = int(rng.integers(1, longest // 16 + 2 if i % 3 else longest // 3))
        prompt = (*begin, *rng.integers(0, vocabulary, own).tolist())
        sampling = SamplingParams(max_new_tokens=new, ignore_eos=True, **ways[i % len(ways)])
        asks.append(Ask(prompt, sampling))
    return asks


def undisturbed(
    params: Params, config: ModelConfig, asks: Sequence[Ask], options: EngineOptions
) -> list[tuple[int, ...]]:
    """The tokens of every request on a single device, with which those of the cluster have to agree."""
    config = config.replace(num_nextn_predict_layers=0)
    with Engine(params, config, options=options) as engine:
        results = engine.generate([list(a.prompt) for a in asks], [a.sampling for a in asks])
    return [result.token_ids for result in results]


class Load:
    """Clients each of which sends its next request when the last one has ended.

    Args:
      engine: what they ask.
      asks: what they may ask for.
      clients: how many.
      seed: of the order in which requests are sent.
    """

    def __init__(self, engine: Engine, asks: Sequence[Ask], clients: int, seed: int):
        self._engine, self._asks = engine, asks
        self._rng = np.random.default_rng([seed, 23])
        self._streams: dict[int, Stream] = {}  # by record, of what is in flight
        self._lock = threading.Condition()
        self._due = [(0.0, i) for i in range(clients)]  # (when, order): a client sends its next
        self._order = itertools.count(clients)
        self._stopping = False
        self.records: list[Record] = []
        self.first_token = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxmoe-clients", daemon=True)

    def start(self) -> "Load":
        """Sends the first requests."""
        self._thread.start()
        return self

    def stop(self, timeout_s: float) -> list[Record]:
        """Sends no more, waits for what is in flight, and gives all records; what has not ended then is cancelled."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join()
        with self._lock:
            self._lock.wait_for(lambda: not self._streams, timeout_s)
            left = list(self._streams.values())
            records = [r if r.ends else dataclasses.replace(r) for r in self.records]
        for stream in left:
            stream.cancel()
        return records

    def cancel(self, number: int) -> int:
        """Some clients give up their request, however far it is; returns how many."""
        with self._lock:
            flying = sorted(self._streams)
            chosen = self._rng.permutation(len(flying))[:number]
            streams = [(flying[i], self._streams[flying[i]]) for i in chosen]
            for index, _ in streams:
                self.records[index].cancelled = True
        return sum(stream.cancel() for _, stream in streams)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not (
                    self._due and self._due[0][0] <= time.monotonic()
                ):
                    soonest = self._due[0][0] - time.monotonic() if self._due else None
                    self._lock.wait(soonest)
                if self._stopping:
                    return
                heapq.heappop(self._due)
                index = len(self.records)
                ask = int(self._rng.integers(len(self._asks)))
                record = Record(ask, time.monotonic())
                self.records.append(record)
            self._send(index, record)

    def _send(self, index: int, record: Record) -> None:
        ask = self._asks[record.ask]

        def on_chunk(chunk: Chunk) -> None:
            now = time.monotonic()
            record.tokens += chunk.token_ids
            record.times += [now] * len(chunk.token_ids)
            if chunk.token_ids:
                self.first_token.set()
            if chunk.finish_reason is not None:
                record.ends, record.ended = record.ends + 1, now
                record.reason, record.error = chunk.finish_reason, chunk.error
                self._next(index, now + _AGAIN_AFTER_S * (chunk.error is not None))

        stream = self._engine.submit(list(ask.prompt), ask.sampling, on_chunk=on_chunk)
        with self._lock:
            if not record.ends:
                self._streams[index] = stream

    def _next(self, index: int, due: float) -> None:
        with self._lock:
            self._streams.pop(index, None)
            heapq.heappush(self._due, (due, next(self._order)))
            self._lock.notify_all()
