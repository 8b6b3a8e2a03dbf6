"""Load for a server or an engine: what to ask, when, and what came back when. All times in seconds."""

import asyncio
import csv
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

TIMEOUT_S = 600.0  # for one request; then it counts as failed


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: when it arrives after the start (None in a closed loop), and how much it asks for."""

    arrival_s: float | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclasses.dataclass
class Record:
    """What a client saw of one request, by ``time.perf_counter()``.

    Attributes:
      began: when it was sent.
      late_s: how much later than planned that was; the load generator's own fault.
      chunks: (time, weight) as output came; a weight is in tokens in this process, in characters over HTTP.
      ended: when the last of it came.
      tokens: tokens of output, by the server's usage count.
      outcome: "ok", "refused" (429 or a full queue) or "failed".
      error: what went wrong.
    """

    prompt_tokens: int
    began: float = 0.0
    late_s: float = 0.0
    chunks: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    outcome: str = "failed"
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """To the first text."""
        return (self.chunks[0][0] if self.chunks else self.ended) - self.began

    @property
    def tpot_s(self) -> float | None:
        """Mean per token after the first; None for fewer than two."""
        if self.tokens < 2 or not self.chunks:
            return None
        return (self.chunks[-1][0] - self.chunks[0][0]) / (self.tokens - 1)

    @property
    def total_s(self) -> float:
        """To the end."""
        return self.ended - self.began


# -- what to ask -------------------------------------------------------------------------------------


def random_items(
    count: int,
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    seed: int,
    *,
    rate: float | None = None,
    shared_prefix: int = 0,
) -> list[Item]:
    """Requests with lengths drawn evenly from (least, most), and Poisson arrivals at ``rate`` per second if given."""
    rng = np.random.default_rng(seed)
    arrivals = [None] * count if rate is None else np.cumsum(rng.exponential(1 / rate, count))
    prompts = rng.integers(prompt_tokens[0], prompt_tokens[-1] + 1, count)
    outputs = rng.integers(output_tokens[0], output_tokens[-1] + 1, count)
    prefix = _bytes(rng, shared_prefix)
    return [
        Item(None if a is None else float(a), prefix + _bytes(rng, int(p)), int(o))
        for a, p, o in zip(arrivals, prompts, outputs, strict=True)
    ]


def _bytes(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, count).tolist())


def trace_items(path: pathlib.Path, seed: int) -> list[Item]:
    """Requests of a CSV with the columns arrival_s, prompt_tokens and output_tokens; prompts are random bytes.

    Raises:
      ValueError: names the line that cannot be used.
    """
    rng = np.random.default_rng(seed)
    items = []
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        missing = {"arrival_s", "prompt_tokens", "output_tokens"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} needs a header with {sorted(missing)}; add the columns.")
        for row in rows:
            try:
                arrival, prompt, output = (
                    float(row["arrival_s"]),
                    int(row["prompt_tokens"]),
                    int(row["output_tokens"]),
                )
                if not (arrival >= 0 and prompt >= 1 and output >= 1):
                    raise ValueError
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path} line {rows.line_num}: arrival_s must be >= 0, and prompt_tokens and output_tokens "
                    f"integers >= 1; got {list(row.values())}."
                ) from None
            items.append(Item(arrival, _bytes(rng, prompt), output))
    if not items:
        raise ValueError(f"{path} has no requests; add a line.")
    return sorted(items, key=lambda item: item.arrival_s)


# -- whom to ask -------------------------------------------------------------------------------------


class Target(Protocol):
    """Something that answers requests."""

    async def send(self, item: Item, record: Record) -> None:
        """Sends a request and fills in the record; must not raise but for programming errors."""


class HttpTarget:
    """A server with OpenAI's /v1/completions, streamed.

    Args:
      client: an ``httpx2.AsyncClient`` with the server's address.
      model: the name to ask for.
    """

    def __init__(self, client: Any, model: str):
        self._client, self._model = client, model

    def _body(self, item: Item) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(item.prompt),
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def send(self, item: Item, record: Record) -> None:
        """One streamed completion."""
        import httpx2

        try:
            async with self._client.stream("POST", "v1/completions", json=self._body(item)) as got:
                if got.status_code != 200:
                    await got.aread()
                    record.outcome = "refused" if got.status_code == 429 else "failed"
                    record.error = f"status {got.status_code}: {got.text[:200]}"
                else:
                    await self._read(got, record)
        except httpx2.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        record.ended = time.perf_counter()

    @staticmethod
    async def _read(response: Any, record: Record) -> None:
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                record.outcome = "ok" if record.error is None else "failed"
                return
            event = json.loads(data)
            if "error" in event:
                record.error = str(event["error"])[:200]
            if event.get("usage"):
                record.tokens = event["usage"]["completion_tokens"]
                record.prompt_tokens = event["usage"]["prompt_tokens"]
            for choice in event.get("choices", ()):
                if choice["text"] or choice["finish_reason"]:
                    record.chunks.append((time.perf_counter(), len(choice["text"])))
        record.error = record.error or "the stream ended without [DONE]"


class EngineTarget:
    """An engine in this process."""

    def __init__(self, engine: Any):
        self._engine = engine

    async def send(self, item: Item, record: Record) -> None:
        """One request; times are those of the engine's thread."""
        from jaxmoe.engine import EngineClosed, QueueFull, SamplingParams

        loop, end = asyncio.get_running_loop(), asyncio.Event()

        def on_chunk(chunk: Any) -> None:
            if chunk.token_ids:
                record.chunks.append((time.perf_counter(), len(chunk.token_ids)))
                record.tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                record.ended = time.perf_counter()
                finished = chunk.finish_reason in ("stop", "length")
                record.outcome, record.error = "ok" if finished else "failed", chunk.error
                loop.call_soon_threadsafe(end.set)

        sampling = SamplingParams(max_new_tokens=item.output_tokens, ignore_eos=True)
        try:
            # In a thread: the engine is locked while it plans a step.
            stream = await asyncio.to_thread(
                self._engine.submit, list(item.prompt), sampling, on_chunk=on_chunk
            )
            try:
                await end.wait()
            finally:
                stream.cancel()
        except (QueueFull, EngineClosed, ValueError) as error:
            record.outcome = "refused" if isinstance(error, QueueFull) else "failed"
            record.error, record.ended = str(error), time.perf_counter()


# -- when to ask -------------------------------------------------------------------------------------


class Run:
    """The records of one run; ``in_flight`` while it goes on.

    Args:
      target: whom to ask.
    """

    def __init__(self, target: Target):
        self._target = target
        self.records: list[Record] = []
        self.in_flight = 0
        self.began = self.ended = 0.0

    async def _one(self, item: Item, planned: float | None) -> None:
        record = Record(len(item.prompt), began=time.perf_counter())
        record.late_s = 0.0 if planned is None else record.began - planned
        self.records.append(record)
        self.in_flight += 1
        try:
            await asyncio.wait_for(self._target.send(item, record), TIMEOUT_S)
        except TimeoutError:
            record.outcome, record.error = "failed", f"no end after {TIMEOUT_S:g} s"
            record.ended = time.perf_counter()
        finally:
            self.in_flight -= 1

    async def closed_loop(self, items: Sequence[Item], concurrency: int) -> None:
        """``concurrency`` clients, each of which sends its next request when the last one has ended."""

        async def client(left: Iterator[Item]) -> None:
            for item in left:
                await self._one(item, None)

        left = iter(items)
        self.began = time.perf_counter()
        await asyncio.gather(*(client(left) for _ in range(concurrency)))
        self.ended = time.perf_counter()

    async def open_loop(self, items: Sequence[Item]) -> None:
        """Requests at their arrival times, whether or not earlier ones have ended."""
        self.began = time.perf_counter()
        tasks = []
        for item in items:
            planned = self.began + item.arrival_s
            await asyncio.sleep(max(0.0, planned - time.perf_counter()))
            tasks.append(asyncio.create_task(self._one(item, planned)))
        await asyncio.gather(*tasks)
        self.ended = time.perf_counter()
