"""A real server on a free loopback port, over a small engine; and an engine whose output is scripted."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time

import httpx2
import jax
import numpy as np

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.elastic.cluster.supervisor import environment
from jaxmoe.engine import Engine, EngineOptions
from jaxmoe.serve.api import Lifecycle, build_app
from jaxmoe.serve.options import ApiOptions, ServerOptions
from jaxmoe.serve.server import Server, listen

# Two layers, one with experts: everything a request passes through, quickly compiled.
CONFIG = jaxmoe.presets["tiny"].replace(num_hidden_layers=2, num_nextn_predict_layers=0)
MODEL = "tiny"
HELLO = [{"role": "user", "content": "Hello"}]
SCRIPTED = {"model": MODEL, "temperature": 0, "logit_bias": {"0": 0}}  # for requests of `says`
LIMIT_S = 120.0  # against hanging only
START_S = 500.0  # where all is compiled
NAME = "two-layers"  # of a checkpoint of CONFIG


def make_engine(**options):
    """An engine with random weights. Close it."""
    params = jaxmoe.init_params(CONFIG, jax.random.key(0))
    sizes = {"max_running": 4, "max_step_tokens": 64, "max_length": 4096} | options
    return Engine(params, CONFIG, options=EngineOptions(**sizes))


@contextlib.contextmanager
def serving(engine, *, send_buffer=None, header_timeout_s=10.0, **options):
    """The address of a server over ``engine``, which stays open."""
    sock = listen("127.0.0.1", 0)
    if send_buffer is not None:  # Accepted connections inherit it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    lifecycle = Lifecycle()
    app = build_app(engine, ApiOptions(MODEL, **options), lifecycle=lifecycle)
    start = ServerOptions(drain_s=10, warm_up=False, header_timeout_s=header_timeout_s)
    server = Server(app, engine, lifecycle, start)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        app.state.service.metrics.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def process(*args, model=(MODEL, "--random-weights"), warm_up=False):
    """A real ``jaxmoe serve``; yields it and its address, once it is ready or has begun to warm up."""
    command = [sys.executable, "-u", "-c", "from jaxmoe.cli import main; main()", "serve"]
    root = os.path.dirname(os.path.dirname(jaxmoe.__file__))
    child = subprocess.Popen(
        [*command, *model, "--port", "0", f"--{'' if warm_up else 'no-'}warm-up", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment() | {"PYTHONPATH": root},
    )
    try:
        line = child.stdout.readline()
        url = re.search(r"http://[^/]*", line).group()
        status = 503 if warm_up else 200
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == status)
        yield child, url
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@contextlib.contextmanager
def ranks_process(folder, *args, ranks=3):
    """``jaxmoe serve --ranks`` over the checkpoint in ``folder / NAME``, ready; its process and address.

    Compiled programs stay in the folder, for the next one.
    """
    programs = ("--programs", str(folder / "programs"))
    # On a busy machine a rank that compiles may be silent for long.
    sizes = "--max-running 4 --max-step-tokens 4 --max-length 256 --page-size 8 --silence-s 20"
    model = (str(folder / NAME), "--ranks", str(ranks))
    with process(*sizes.split(), *programs, *args, model=model, warm_up=True) as (child, url):
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, START_S)
        yield child, url


def save_model(folder):
    """Writes the checkpoint that ``ranks_process`` serves."""
    checkpoint.save(folder / NAME, jaxmoe.init_params(CONFIG, jax.random.key(0)), CONFIG, step=1)


def wait_until(condition, limit_s=LIMIT_S):
    """Waits for ``condition()``; fails after a long time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def is_idle(engine):
    """Whether nothing is left of any request."""
    stats = engine.stats()
    return stats.running == 0 and stats.waiting == 0 and stats.pages_held == 0


class Script:
    """A grammar that allows one text only. The model, its sampler and all around them stay real."""

    complete = False
    error = None

    def __init__(self, text):
        self._left = [*text.encode(), CONFIG.eos_token_id]

    def forbid(self, bias, after=()):
        allowed = self._left[min(len(after), len(self._left) - 1)]
        bias[:] = -np.inf
        bias[allowed] = 0

    def take(self, token):
        assert token == self._left.pop(0)
