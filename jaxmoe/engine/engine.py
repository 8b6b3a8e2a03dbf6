"""The engine: many requests at a time through one model, from a notebook or behind a server."""

import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe.cache import init_cache
from jaxmoe.config import ModelConfig
from jaxmoe.engine import grammar, sampling
from jaxmoe.engine.pages import PagePool
from jaxmoe.engine.requests import Chunk, Request, Result, SamplingParams, TokenLogprobs
from jaxmoe.engine.scheduler import Limits, Scheduler, Work
from jaxmoe.engine.stats import EngineStats, Events, Smoothed
from jaxmoe.engine.step import Batch, StepResult, make_program, pack
from jaxmoe.engine.stream import Progress, Stream, key_data
from jaxmoe.engine.text import StoppableText
from jaxmoe.errors import JaxMoeError
from jaxmoe.params import Params
from jaxmoe.sharding import shardings
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer

logger = logging.getLogger(__name__)

DEFAULT_TOKENS_PER_REQUEST = 1024  # of the default cache: for max_running requests of this length


class EngineClosed(JaxMoeError):
    """The engine takes no new requests: it is draining or closed."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine."""

    max_running: int = 32
    """Requests with cache pages, per rank."""
    max_step_tokens: int = 256
    """Tokens of one step, per rank; longer prompts are cut into steps."""
    max_waiting: int = 1024
    """Requests that may wait; one more is refused."""
    page_size: int = 32
    """Tokens per cache page."""
    pages: int | None = None
    """Cache pages per rank; default: for max_running requests of 1024 tokens, and for one of max_length."""
    max_length: int | None = None
    """Tokens that a request may have, prompt included; default: the model's, at most 8192."""
    prefix_reuse: bool = True
    """Whether prompts that begin like earlier ones reuse their cache rows."""

    def __post_init__(self):
        for name in (
            "max_running",
            "max_step_tokens",
            "max_waiting",
            "page_size",
            "pages",
            "max_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")


def _sizes(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest``: how many tokens a compiled step may have."""
    powers = itertools.takewhile(lambda n: n < largest, (1 << i for i in itertools.count()))
    return [*powers, largest]


class Engine:
    """Continuous batching over a paged cache.

    One background thread runs the steps; every method may be called from any thread. A request's tokens do not depend on
    what else runs: draws depend on its own seed, and on CPU the arithmetic of a token is the same bit for bit whoever
    shares its step (``steps.run_step``), so that greedy output equals ``jaxmoe.generate``'s.

    Args:
      params: parameters.
      config: the model.
      tokenizer: for text prompts and results; default bytes.
      options: sizes and limits.
      mesh: ranks along its axis "expert": each owns its requests' cache pages and its share of the experts.

    Example:
      >>> import jax, jaxmoe
      >>> config = jaxmoe.presets["tiny"].replace(num_nextn_predict_layers=0)
      >>> with jaxmoe.Engine(jaxmoe.init_params(config, jax.random.key(0)), config) as engine:
      ...     results = engine.generate(["Hello", "World"], SamplingParams(max_new_tokens=3, ignore_eos=True))
      >>> [len(result.token_ids) for result in results]
      [3, 3]
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: ByteTokenizer | FileTokenizer | None = None,
        options: EngineOptions = EngineOptions(),
        *,
        mesh: Mesh | None = None,
    ):
        self.config, self.options = config, options
        self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self.max_length = options.max_length or min(config.max_position_embeddings, 8192)
        if self.max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length ({self.max_length}) must be <= the model's max_position_embeddings "
                f"({config.max_position_embeddings}); shorten it."
            )
        self.ranks = 1 if mesh is None else mesh.shape["expert"]
        self._program = make_program(config, mesh)
        self._params = params if mesh is None else jax.device_put(params, shardings(config, mesh))
        self._width = -(-self.max_length // options.page_size)
        pages = options.pages or max(
            self._width, options.max_running * DEFAULT_TOKENS_PER_REQUEST // options.page_size
        )
        pools = [
            PagePool(pages, options.page_size, reuse=options.prefix_reuse)
            for _ in range(self.ranks)
        ]
        limits = Limits(options.max_running, options.max_step_tokens, options.max_waiting)
        self._scheduler = Scheduler(pools, limits)
        dtype = params["embed"]["weight"].dtype
        cache = init_cache(config, pages * self.ranks, options.page_size, dtype)
        self._entries = self._program.place_cache(cache.entries)
        self._tables = np.full((self.ranks, options.max_running, self._width), -1, np.int32)
        self._sizes = _sizes(options.max_step_tokens)
        eos = config.eos_token_id
        self._eos = frozenset(() if eos is None else np.atleast_1d(np.asarray(eos)).tolist())
        self._requests: dict[str, Request] = {}
        self._lock = threading.RLock()
        self._stepping = threading.RLock()  # who holds it may replace the cache; taken before _lock
        self._wake = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self._events = Events()
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._finished: Counter[str] = Counter()
        self._step_s, self._schedule_s = Smoothed(), Smoothed()
        self._load: np.ndarray | None = None

    # -- requests ----------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
    ) -> Stream:
        """Queues a request and returns at once.

        Args:
          prompt: text or token ids.
          sampling: how to choose tokens.
          priority: higher goes first and is preempted last.
          timeout_s: after this the request ends with "deadline", with what it has.
          request_id: a name that no present request has; default a fresh one.
          on_chunk: called on the engine's thread with every chunk, instead of the returned stream's iteration. Must not block.

        Raises:
          ValueError, TypeError: for a bad prompt or parameter.
          QueueFull: if too many requests wait.
          EngineClosed: while draining and after ``close``.
        """
        ids = self._ids(prompt)
        if len(ids) + 1 > self.max_length:
            raise ValueError(
                f"prompt has {len(ids)} tokens but the engine's max_length is {self.max_length}, output included; "
                "shorten the prompt."
            )
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0 or None; got {timeout_s}.")
        room = self.max_length - len(ids)
        if sampling.max_new_tokens > room:
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        for token, _ in sampling.logit_bias:
            if token >= self.config.vocab_size:
                raise ValueError(
                    f"logit_bias names token {token}; ids must be below vocab_size ({self.config.vocab_size})."
                )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request = Request(ids, sampling, priority, deadline, request_id or "")
        stop = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self._eos
        )
        request.progress = Progress(
            Stream(request, self.cancel),
            StoppableText(self.tokenizer.stream(), sampling.stop),
            key_data(seed),
            stop,
            on_chunk,
            grammar.start(sampling.json_schema, self.tokenizer, self.config, self._eos),
        )
        with self._wake:
            if self._draining or self._closed:
                raise EngineClosed("the engine takes no new requests; it is draining or closed.")
            if request.request_id in self._requests:
                raise ValueError(f"request_id {request.request_id!r} is in use; choose another.")
            self._scheduler.submit(request)
            self._requests[request.request_id] = request
            self.start()
            self._wake.notify_all()
        return request.progress.stream

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("prompt must have at least one token; got none.")
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids):
            raise TypeError("prompt must be text or integer token ids.")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"prompt ids must lie in [0, vocab_size={self.config.vocab_size}); got {min(ids)}..{max(ids)}."
            )
        return [int(i) for i in ids]

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """Chunks of one request; leaving the loop early cancels it. Arguments as in ``submit``."""
        stream = self.submit(prompt, sampling, **kwargs)
        try:
            yield from stream
        finally:
            stream.cancel()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        **kwargs: Any,
    ) -> list[Result]:
        """Results of several requests, in order. Arguments as in ``submit``; ``sampling`` one for all, or one each."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(
                f"sampling must be one or one per prompt ({len(prompts)}); got {len(each)}."
            )
        streams: list[Stream] = []
        try:
            for prompt, params in zip(prompts, each, strict=True):
                streams.append(self.submit(prompt, params, **kwargs))
            return [stream.result() for stream in streams]
        except BaseException:  # nobody will ask for the others
            for stream in streams:
                stream.cancel()
            raise

    def cancel(self, request_id: str) -> bool:
        """Ends a request at the next step; False if it is not there any more."""
        with self._wake:
            request = self._requests.get(request_id)
            if request is None:
                return False
            request.progress.cancelled = True
            self._wake.notify_all()
            return True

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread, if it does not run; ``submit`` does it too."""
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed; make a new one.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="jaxmoe-engine", daemon=True)
                self._thread.start()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests and waits for the present ones; False if some are left after ``timeout_s``."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._requests, timeout_s)

    def close(self) -> None:
        """Cancels what is left and stops the thread."""
        with self._wake:
            self._draining = self._closed = True
            for request in self._requests.values():
                request.progress.cancelled = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def subscribe(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Calls ``callback`` on the engine's thread with events; returns a function that ends this.

        Events: {"type": "first_token", "request_id", "seconds"} and {"type": "finished", "request_id", "reason", "ttft_s",
        "tpot_s" (None for fewer than two tokens), "prompt_tokens", "output_tokens"}.
        """
        return self._events.subscribe(callback)

    def stats(self) -> EngineStats:
        """Counters of this moment."""
        with self._lock:
            pools = self._scheduler.pools
            load = self._load if self._load is not None else np.zeros((0, 0), np.int64)
            experts = np.arange(self.config.n_routed_experts or 0).reshape(self.ranks, -1)
            return EngineStats(
                waiting=self._scheduler.waiting_count,
                running=self._scheduler.running_count,
                preemptions=self._scheduler.preemptions,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                generated_tokens=self._generated,
                finished=dict(self._finished),
                pages=sum(pool.pages for pool in pools),
                pages_held=sum(pool.held for pool in pools),
                pages_idle=sum(pool.idle for pool in pools),
                step_s=self._step_s.value,
                schedule_s=self._schedule_s.value,
                expert_load=load.copy(),
                ranks=self.ranks,
                epoch=0,
                rank_experts=experts.tolist(),
                draining=self._draining,
            )

    def warmup(self) -> dict[str, Any]:
        """Compiles every size of step, and greedy and drawn sampling for each.

        Returns:
          {"executables": how many, "seconds": in all, "sizes": the steps' tokens}.
        """
        began, count = time.perf_counter(), 0
        with self._stepping, self._lock:
            for size in self._sizes:
                batch = self._pack([[]] * self.ranks, size)
                result = self._compute(batch)
                self._entries = self._program.commit(self._entries, result.entries, batch)
                count += 2 + sampling.warm_up(result.logits)
            jax.block_until_ready(self._entries)
        return {
            "executables": count,
            "seconds": time.perf_counter() - began,
            "sizes": list(self._sizes),
        }

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._requests or self._closed)
                if self._closed and not self._requests:
                    return
            try:
                with self._stepping:
                    self._step()
            except Exception as error:  # whatever it is, no caller may wait for ever
                logger.exception("engine step failed")
                self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, message: str) -> None:
        with self._wake:
            for request in list(self._requests.values()):
                self._finish(request, "error", Chunk(finish_reason="error", error=message))

    def _step(self) -> None:
        """Plans, computes, samples and commits one step."""
        began = time.perf_counter()
        with self._wake:
            self._sweep()
            works = self._scheduler.plan()
            total = max((sum(w.stop - w.start for w in rank) for rank in works), default=0)
            if total == 0:
                return
            size = next(s for s in self._sizes if s >= total)
            batch = self._pack(works, size)
        computing = time.perf_counter()
        result = self._compute(batch)
        rows = result.logits.shape[0] // self.ranks
        asking = [[work.request for work in rank if work.samples] for rank in works]
        sampled = sampling.next_tokens(result.logits, asking)
        load = sum(np.split(np.asarray(result.load, np.int64), self.ranks))
        entries = self._program.commit(self._entries, result.entries, batch)
        computed = time.perf_counter()
        with self._wake:
            self._entries = entries
            self._load = load if self._load is None else self._load + load
            for rank, work in enumerate(works):
                self._take(work, sampled, rank * rows)
            self._steps += 1
            self._wake.notify_all()
        ended = time.perf_counter()
        self._step_s.add(ended - began)
        self._schedule_s.add(ended - computed + computing - began)

    def _sweep(self) -> None:
        """Ends cancelled requests and those past their deadline."""
        now = time.monotonic()
        for request in list(self._requests.values()):
            if request.progress.cancelled:
                self._finish(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                self._finish(request, "deadline")

    def _pack(self, works: list[list[Work]], size: int) -> Batch:
        """The ranks' batches one after another. Slots, spans, pages and rows stay each rank's own."""
        rows, batches = min(size, self.options.max_running), []
        for tables, mine in zip(self._tables, works, strict=True):
            for work in mine:
                pages = work.request.pages
                tables[work.request.slot] = -1
                tables[work.request.slot, : len(pages)] = pages
            batches.append(pack(mine, size, rows, tables))
        if len(batches) == 1:
            return batches[0]
        return Batch(*map(np.concatenate, zip(*batches, strict=True)))

    def _compute(self, batch: Batch) -> StepResult:
        return self._program.compute(self._params, self._entries, batch, None)

    def _take(self, works: list[Work], sampled: sampling.Sampled | None, first: int) -> None:
        """Notes a rank's computed tokens and hands out its sampled ones."""
        row = first
        for work in works:
            self._scheduler.advance(work)
            request = work.request
            if not work.samples:
                continue
            token = int(sampled.token[row])
            logprobs = ()
            if request.sampling.logprobs is not None:
                best = range(request.sampling.logprobs)
                top = [
                    (int(sampled.top_tokens[row, i]), float(sampled.top_logprobs[row, i]))
                    for i in best
                ]
                logprobs = (TokenLogprobs(token, float(sampled.logprob[row]), tuple(top)),)
            row += 1
            self._append(request, token, logprobs)

    def _append(self, request: Request, token: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Adds a sampled token to a request and ends it if that is its last."""
        progress = request.progress
        if progress.first_token is None:
            progress.first_token = time.monotonic()
            self._prompt_tokens += len(request.prompt)
            self._cached_tokens += request.cached_tokens
            seconds = progress.first_token - progress.submitted
            self._events.tell(
                {"type": "first_token", "request_id": request.request_id, "seconds": seconds}
            )
        request.output.append(token)
        self._generated += 1
        if progress.grammar is not None:
            progress.grammar.take(token)
        if token in progress.stop_ids:
            self._finish(request, "stop")
            return
        text = progress.text.push(token)
        reason = None
        if progress.text.stopped or (progress.grammar is not None and progress.grammar.complete):
            reason = "stop"
        elif len(request.output) >= request.sampling.max_new_tokens:
            reason = "length"
        if reason is None:
            progress.emit(Chunk((token,), text, logprobs))
        else:
            self._finish(request, reason, Chunk((token,), text, logprobs))

    def _finish(self, request: Request, reason: str, last: Chunk = Chunk()) -> None:
        """Ends a request with a last chunk and forgets it."""
        progress = request.progress
        text = last.text + progress.text.end()
        progress.emit(dataclasses.replace(last, text=text, finish_reason=reason))
        self._scheduler.finish(request)
        del self._requests[request.request_id]
        self._finished[reason] += 1
        result = progress.finish(request, reason)
        outputs = len(request.output)
        tpot = None
        if outputs > 1:
            tpot = (result.total_s - result.time_to_first_token_s) / (outputs - 1)
        self._events.tell(
            {
                "type": "finished",
                "request_id": request.request_id,
                "reason": reason,
                "ttft_s": result.time_to_first_token_s,
                "tpot_s": tpot,
                "prompt_tokens": len(request.prompt),
                "output_tokens": outputs,
            }
        )
        self._wake.notify_all()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"Engine({self.ranks} rank{'s' * (self.ranks > 1)}, {stats.running} running, {stats.waiting} waiting, "
            f"{stats.pages_held} of {stats.pages} pages held)"
        )
