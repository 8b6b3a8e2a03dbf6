"""The engine: many requests at a time through one model, from a notebook or behind a server."""

import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.engine.admission import Admission
from jaxmoe.engine.options import EngineOptions
from jaxmoe.engine.pages import PagePool
from jaxmoe.engine.requests import Chunk, Request, Result, SamplingParams, TokenLogprobs
from jaxmoe.engine.runner import Change, ElasticRunner, Outcome, Runner
from jaxmoe.engine.scheduler import Scheduler
from jaxmoe.engine.stats import EngineStats, Events, Smoothed
from jaxmoe.engine.stream import Stream
from jaxmoe.engine.widths import WidthPolicy, Widths
from jaxmoe.errors import JaxMoeError
from jaxmoe.params import Params
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MOST_MOVES = 8  # ranks that a request may lose before it ends with an error


class EngineClosed(JaxMoeError):
    """The engine takes no new requests: it is draining or closed."""


def _settle(work: Callable[[], Any], future: Future) -> None:
    """Does the work and hands its result, or what it raises, to those who wait for it."""
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


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
      cluster: ranks that may fail and return (``elastic.Cluster``), which hold the parameters; ``params`` is None then.
      width_policy: (prompt, sampling) to the SEFP width of a request that names none; may return None (``engine.widths``).

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
        params: Params | None,
        config: ModelConfig,
        tokenizer: ByteTokenizer | FileTokenizer | None = None,
        options: EngineOptions = EngineOptions(),
        *,
        mesh: Mesh | None = None,
        cluster: ElasticRunner | None = None,
        width_policy: WidthPolicy | None = None,
    ):
        self.config, self.options, self.cluster = config, options, cluster
        self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self.max_length = options.longest(config)
        sizes = options.sizes(self.max_length)
        widths = Widths(params, options.widths, options.width, options.draft_width, width_policy)
        self.widths = widths.served
        if cluster is None:
            self._runner = Runner(widths.params, config, sizes, mesh, widths.served)
        else:
            self._runner = cluster
            cluster.start(sizes)
        pools = [
            PagePool(sizes.pages, options.page_size, reuse=options.prefix_reuse)
            for _ in range(self._runner.ranks)
        ]
        self._scheduler = Scheduler(pools, options.limits())
        self._admission = Admission(config, self.tokenizer, self.max_length, self.cancel, widths)
        self._requests: dict[str, Request] = {}
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._tasks: deque[tuple[Callable[[], Any], Future]] = deque()
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self._events = Events()
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._finished: Counter[str] = Counter()
        self._step_s, self._schedule_s = Smoothed(), Smoothed()
        if cluster is not None:
            self._scheduler.adopt(cluster.active, ())  # some may be spare
            cluster.on_change = self._notice

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
        request = self._admission.request(
            prompt, sampling, priority, timeout_s, request_id, on_chunk
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

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """Chunks of one request; leaving the loop early cancels it. Arguments as in ``submit``, but for ``on_chunk``."""
        if "on_chunk" in kwargs:
            raise TypeError(
                "stream hands out the chunks itself; leave on_chunk out, or use submit."
            )
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
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list; got one text. Use [{prompts[:20]!r}].")
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(
                f"sampling must be one or one per prompt ({len(prompts)}); got {len(each)}."
            )
        streams: list[Stream] = []
        try:
            for prompt, params in zip(prompts, each, strict=True):
                self._wait_for_room()
                streams.append(self.submit(prompt, params, **kwargs))
            return [stream.result() for stream in streams]
        except BaseException:  # nobody will ask for the others
            for stream in streams:
                stream.cancel()
            raise

    def _wait_for_room(self) -> None:
        """Until one more request may wait."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._scheduler.waiting_count < self.options.max_waiting
                    or self._draining
                    or self._closed
                )
            )

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
        if thread is None:
            self._runner.close()
        elif thread is not threading.current_thread():
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
            ranks = self._runner.ranks
            return EngineStats(
                waiting=self._scheduler.waiting_count,
                running=self._scheduler.running_count,
                preemptions=self._scheduler.preemptions,
                width_steps=dict(self._scheduler.width_steps),
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
                expert_load=self._runner.load,
                drafted_tokens=self._runner.drafted,
                accepted_tokens=self._runner.accepted,
                ranks=ranks,
                epoch=self._runner.epoch,
                rank_experts=self._runner.rank_experts,
                draining=self._draining,
            )

    def warmup(self) -> dict[str, Any]:
        """Compiles every size of step and every kind of sampling, between the steps of what runs meanwhile.

        Returns:
          {"executables": how many, "seconds": in all, "sizes": the steps' tokens}.
        """
        began, done = time.perf_counter(), set()
        for size in self._runner.buckets:
            done |= self._between_steps(functools.partial(self._runner.warm_up, size))
        seconds = time.perf_counter() - began
        return {"executables": len(done), "seconds": seconds, "sizes": list(self._runner.buckets)}

    # -- the thread --------------------------------------------------------------------------------

    def _between_steps(self, work: Callable[[], _T]) -> _T:
        """Has the engine's thread do something that no step may overlap with, and waits for it."""
        if threading.current_thread() is self._thread:
            return work()
        future: Future[_T] = Future()
        with self._wake:
            self.start()
            self._tasks.append((work, future))
            self._wake.notify_all()
        return future.result()

    def _run(self) -> None:
        while True:
            try:
                with self._wake:
                    self._wake.wait_for(self._has_work)
                    if self._closed and not self._requests and not self._tasks:
                        break
                    task = self._tasks.popleft() if self._tasks else None
                if task is not None:
                    _settle(*task)
                self._step()
            except Exception as error:  # whatever it is, no caller may wait for ever
                logger.exception("engine step failed")
                self._fail(f"{type(error).__name__}: {error}")
        self._runner.close()

    def _has_work(self) -> bool:
        return bool(self._requests or self._tasks or self._closed or self._runner.pending())

    def _fail(self, message: str) -> None:
        with self._wake:
            for request in list(self._requests.values()):
                self._finish(request, "error", Chunk(finish_reason="error", error=message))
            if self._runner.restore():
                for pool in self._scheduler.pools:
                    pool.forget()  # the rows are gone

    def _step(self) -> None:
        """Plans, computes, samples and commits one step."""
        self._adopt(self._runner.poll())
        began = time.perf_counter()
        with self._wake:
            self._sweep()
            works = self._scheduler.plan()
        batch = self._runner.pack(works)
        if batch is None:
            return
        outcomes = self._runner.run(works, batch)
        if isinstance(outcomes, Change):
            self._adopt(outcomes)
            return
        with self._wake:
            for outcome in itertools.chain(*outcomes):
                self._take_or_end(outcome)
            self._steps += 1
            self._wake.notify_all()
        ended = time.perf_counter()
        self._step_s.add(ended - began)
        self._schedule_s.add(ended - began - self._runner.computing_s)

    def _notice(self) -> None:
        """Something has happened to a rank, or is asked of them."""
        with self._wake:
            if not self._closed:
                self.start()
            self._wake.notify_all()

    def _adopt(self, change: Change | None) -> None:
        """Goes on with other ranks; requests whose cache is gone are computed again, with the tokens that they have."""
        if change is None:
            return
        with self._wake:
            for request in self._scheduler.adopt(change.active, change.lost):
                request.moves += 1
                if request.moves > MOST_MOVES:
                    message = f"its rank was lost {request.moves} times; try again."
                    self._finish(request, "error", Chunk(finish_reason="error", error=message))

    def _sweep(self) -> None:
        """Ends cancelled requests and those past their deadline."""
        now = time.monotonic()
        for request in list(self._requests.values()):
            if request.progress.cancelled:
                self._finish(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                self._finish(request, "deadline")

    def _take_or_end(self, outcome: Outcome) -> None:
        """``_take``; what goes wrong in it is that request's own matter, and ends no other."""
        request = outcome.work.request
        try:
            self._take(outcome)
        except Exception as error:
            logger.exception("request failed request=%s", request.request_id)
            if request.request_id in self._requests:
                message = f"{type(error).__name__}: {error}"
                self._finish(request, "error", Chunk(finish_reason="error", error=message))

    def _take(self, outcome: Outcome) -> None:
        """Notes what a step has computed of a request and hands out its new tokens."""
        request = outcome.work.request
        self._scheduler.advance(outcome.work, outcome.accepted)
        for i, token in enumerate(outcome.tokens):
            self._append(request, token, outcome.logprobs[i : i + 1])
            if request.request_id not in self._requests:
                return
        # The next step gives one token more than there are right drafts.
        request.drafts = outcome.drafts[: request.sampling.max_new_tokens - len(request.output) - 1]

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
            if progress.grammar.error is not None:
                message = (
                    f"the form of the output cannot be enforced further: {progress.grammar.error}"
                )
                self._finish(request, "error", Chunk(finish_reason="error", error=message))
                return
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
            f"Engine({stats.ranks} rank{'s' * (stats.ranks > 1)}, {stats.running} running, {stats.waiting} waiting, "
            f"{stats.pages_held} of {stats.pages} pages held)"
        )
