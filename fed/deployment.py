"""A Flower deployment on this machine: a SuperLink, a SuperNode per client and the run, as real processes over TLS on the loopback.

Every process is started here and ended here by its number, with those that it has started; telemetry and installing of dependencies are off.
Faults are real: a node is killed with SIGKILL while it works on a round, with everything that it has started, and then started again.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fed.certificates import HOST, make_certificates
from fed.experiment import Experiment
from jaxmoe.errors import JaxMoeError

_POLL_S = 0.05


class DeploymentFailed(JaxMoeError):
    """A process of the deployment ended or did not get ready; the message has the end of its log."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A node that is killed.

    Attributes:
      client: whose node.
      round: from zero, in which it works when it is killed.
      after_s: seconds after it was asked.
      restart_s: seconds after which it is started again; None: never.
    """

    client: int
    round: int = 1
    after_s: float = 0.5
    restart_s: float | None = 1.0

    @classmethod
    def parse(cls, text: str) -> "Kill":
        """From CLIENT@ROUND.

        Raises:
          ValueError: for anything else.
        """
        client, at, number = text.partition("@")
        if not at or not client.isdecimal() or not number.isdecimal():
            raise ValueError(f"a node to kill must be CLIENT@ROUND; got {text!r}. Example: 2@1.")
        return cls(int(client), int(number))


@dataclasses.dataclass(frozen=True)
class DeployOptions:
    """How to deploy.

    Attributes:
      tls: certificates are made for the run; False for plain HTTP.
      node_timeout_s: until all nodes are there.
      start_timeout_s: until the server's app has begun. Flower starts a program again that needs more than 30 s to begin, as on a
        machine that is busy.
      round_timeout_s: after which a round goes on with who has replied.
      run_timeout_s: for everything.
      concurrency: clients that work at the same time; each starts a process that imports JAX. 0: all; None: one per core.
      kill: a fault, or None.
    """

    tls: bool = True
    node_timeout_s: float = 180.0
    start_timeout_s: float = 300.0
    round_timeout_s: float = 300.0
    run_timeout_s: float = 1500.0
    concurrency: int | None = None
    kill: Kill | None = None


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What a deployment gave.

    Attributes:
      rounds: records, as a simulation's.
      models: arrays by path, "large/..." and "small/0/...".
      events: what the server saw, with times; and what was done to nodes.
      seconds: from the first process to the last one's end.
      privacy: what the run has cost, a line per private rule.
    """

    rounds: list[dict[str, Any]]
    models: dict[str, Any]
    events: list[dict[str, Any]]
    seconds: float
    privacy: tuple[str, ...] = ()


# -- processes -------------------------------------------------------------------------------------


class _Process:
    """A program with a log of its own, and all that it starts."""

    def __init__(self, name: str, command: Sequence[str], log: pathlib.Path, env: dict[str, str]):
        self.name, self.log = name, log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=log.parent,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines of the log, as one."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-8:]
        return " | ".join(line.strip() for line in lines)

    def kill(self) -> None:
        """SIGKILL, to it and everything below it."""
        self._end(signal.SIGKILL)
        self._process.wait()

    def stop(self, patience_s: float = 5.0) -> None:
        """SIGTERM, and SIGKILL for what is left after ``patience_s``."""
        below = self._below()
        self._end(signal.SIGTERM, below)
        end = time.monotonic() + patience_s
        while time.monotonic() < end and (self.ended() is None or any(map(_runs, below))):
            time.sleep(_POLL_S)
        self._end(signal.SIGKILL, below)
        self._process.wait()

    def _below(self) -> list[tuple[int, str]]:
        return _descendants(self._process.pid)

    def _end(self, number: signal.Signals, below: list[tuple[int, str]] | None = None) -> None:
        below = self._below() if below is None else below
        if self.ended() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
        for one in below:
            if _runs(one):  # its number may be another's by now
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one[0], number)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat behind the name; None if there is no such process, or no /proc."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _descendants(pid: int) -> list[tuple[int, str]]:
    """Number and start time of every process below ``pid``. None on systems without /proc: there the process group must do."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        fields = _stat(int(place.name))
        if fields:
            parents.setdefault(int(fields[1]), []).append((int(place.name), fields[19]))
    found, left = [], [pid]
    while left:
        for child in parents.get(left.pop(), []):
            found.append(child)
            left.append(child[0])
    return found


def _runs(one: tuple[int, str]) -> bool:
    fields = _stat(one[0])
    return fields is not None and fields[19] == one[1] and fields[0] != "Z"


def _program(name: str) -> str:
    """A program of Flower's, beside this interpreter or on the path."""
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ImportError(
            f"{name} isn't installed: pip install 'jaxmoe[flower]', in an environment of its own."
        )
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((HOST, 0))
        return [s.getsockname()[1] for s in sockets]


# -- the deployment --------------------------------------------------------------------------------


class _Deployment:
    """Files and processes of one run."""

    def __init__(self, experiment: Experiment, folder: pathlib.Path, options: DeployOptions):
        self.experiment, self.options = experiment, options
        self.folder = folder.absolute()
        self.output = self.folder / "result"
        if self.output.exists():
            shutil.rmtree(self.output)
        self.output.mkdir(parents=True)
        self.ports = _free_ports(experiment.clients + 1)
        certificates = make_certificates(self.folder / "tls") if options.tls else {}
        self.certificates = {k: str(v) for k, v in certificates.items()}
        self.processes: dict[str, _Process] = {}
        self.events: list[dict[str, Any]] = []
        self._write_home()
        self._write_app()

    def _write_home(self) -> None:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        trust = (
            f'root-certificates = "{self.certificates["ca"]}"'
            if self.options.tls
            else "insecure = true"
        )
        text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HOST}:{self.ports[0]}"\n{trust}\n'
        (home / "config.toml").write_text(text)

    def _write_app(self) -> None:
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        code = "from fed.flower import make_client_app, make_server_app\n\nclient = make_client_app()\nserver = make_server_app()\n"
        (app / "jaxmoe_fed_app.py").write_text(code)
        config = {
            "experiment": self.experiment.to_json(),
            "output": str(self.output),
            "node-timeout-s": self.options.node_timeout_s,
            "round-timeout-s": self.options.round_timeout_s,
            "concurrency": (os.cpu_count() or 1)
            if self.options.concurrency is None
            else self.options.concurrency,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
        text = (
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
            '[project]\nname = "jaxmoe-fed-app"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
            '[tool.flwr.app]\npublisher = "jaxmoe"\n\n'
            '[tool.flwr.app.components]\nserverapp = "jaxmoe_fed_app:server"\nclientapp = "jaxmoe_fed_app:client"\n\n'
            "[tool.flwr.app.config]\n" + "\n".join(lines) + "\n"
        )
        (app / "pyproject.toml").write_text(text)

    def _environment(self) -> dict[str, str]:
        root = str(pathlib.Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        programs = str(pathlib.Path(sys.executable).parent)
        return os.environ | {
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": path,
            "NO_PROXY": f"{HOST},localhost",
            "no_proxy": f"{HOST},localhost",
            # Every message is worked on by a new process: it need not compile again.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Starts a program under ``name``."""
        log = self.folder / f"{name}.log"
        command = [_program(program), *arguments]
        self.processes[name] = _Process(name, command, log, self._environment())

    def start_link(self) -> None:
        """The SuperLink; returns when it answers."""
        c = self.certificates
        trust = ["--insecure"]
        if self.options.tls:
            trust = ["--ssl-ca-certfile", c["ca"], "--ssl-certfile", c["certificate"]]
            trust += ["--ssl-keyfile", c["key"]]
        where = ["--host", HOST, "--port", str(self.ports[0])]
        self.start("superlink", "flower-superlink", *trust, *where, "--disable-runtime-dependency-installation")  # fmt: skip
        end = time.monotonic() + self.options.node_timeout_s
        while True:
            self.check()
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.ports[0]), 1):
                return
            if time.monotonic() > end:
                raise DeploymentFailed(
                    f"the SuperLink is not ready after {self.options.node_timeout_s:g} s: {self.processes['superlink'].tail()}"
                )
            time.sleep(_POLL_S)

    def start_node(self, client: int) -> None:
        """The SuperNode of a client."""
        trust = ["--insecure"]
        if self.options.tls:
            trust = ["--root-certificates", self.certificates["ca"]]
        where = ["--superlink", f"{HOST}:{self.ports[0]}", "--host", HOST]
        own = ["--port", str(self.ports[1 + client]), "--node-config", f"client={client}"]
        self.start(f"node{client}", "flower-supernode", *trust, *where, *own)

    def check(self) -> None:
        """Raises DeploymentFailed if a process that should run has ended."""
        for name, process in self.processes.items():
            status = process.ended()
            if status is not None and not (name == "run" and status == 0):
                raise DeploymentFailed(f"{name} ended with status {status}: {process.tail()}")

    def seen(self) -> list[dict[str, Any]]:
        """What the server has noted so far."""
        file = self.output / "events.jsonl"
        if not file.is_file():
            return []
        lines = file.read_text().split("\n")[:-1]  # the last one may not be whole yet
        return [json.loads(line) for line in lines]

    def note(self, name: str, **details: Any) -> None:
        """Notes what was done."""
        self.events.append({"event": name, "time": time.time(), **details})

    def stop(self) -> None:
        """Ends everything, the run first."""
        for name in sorted(self.processes, key=lambda n: ("run", "nod", "sup").index(n[:3])):
            self.processes[name].stop()


def _fault(deployment: _Deployment, kill: Kill) -> Iterator[None]:
    """Does ``kill``, a piece at every turn of the loop that waits for the result."""

    def asked() -> bool:
        return any(
            e["event"] == "asked"
            and e["client"] == kill.client
            and e["round"] == str(kill.round + 1)
            for e in deployment.seen()
        )

    while not asked():
        yield
    end = time.monotonic() + kill.after_s
    while time.monotonic() < end:
        yield
    deployment.processes.pop(f"node{kill.client}").kill()
    deployment.note("killed", client=kill.client, round=str(kill.round + 1))
    if kill.restart_s is None:
        return
    end = time.monotonic() + kill.restart_s
    while time.monotonic() < end:
        yield
    deployment.start_node(kill.client)
    deployment.note("restarted", client=kill.client, round=str(kill.round + 1))


def deploy(
    experiment: Experiment, folder: pathlib.Path, options: DeployOptions = DeployOptions()
) -> Deployed:
    """Runs an experiment on Flower, a process per client.

    Args:
      experiment: what to run.
      folder: gets logs, certificates and the result.
      options: how.

    Raises:
      DeploymentFailed: if a process ends that should run, or nothing is there in time.
      ValueError: for a node to kill that there isn't.
      ImportError: without Flower.
    """
    _program("flower-superlink")
    kill = options.kill
    if kill is not None and not (
        0 <= kill.client < experiment.clients and 0 <= kill.round < experiment.rounds
    ):
        raise ValueError(
            f"kill must name one of {experiment.clients} clients and {experiment.rounds} rounds; got client {kill.client} in round "
            f"{kill.round}."
        )
    began = time.monotonic()
    deployment = _Deployment(experiment, folder, options)
    with _terminable():
        try:
            deployment.start_link()
            for client in range(experiment.clients):
                deployment.start_node(client)
            _submit(deployment)
            _wait(deployment, began)
        finally:
            deployment.stop()
    return _result(deployment, time.monotonic() - began)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process as an exception would, so that no process of the deployment outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _submit(deployment: _Deployment) -> None:
    """Hands the run to the SuperLink; returns when the server's app has begun."""
    options = deployment.options
    deployment.start("run", "flwr", "run", str(deployment.folder / "app"), "here")
    end = time.monotonic() + options.start_timeout_s
    while not deployment.seen():
        deployment.check()
        if time.monotonic() > end:
            raise DeploymentFailed(
                f"the server's app did not begin within {options.start_timeout_s:g} s: {deployment.processes['superlink'].tail()}"
            )
        time.sleep(_POLL_S)


def _wait(deployment: _Deployment, began: float) -> None:
    options = deployment.options
    fault = iter(()) if options.kill is None else _fault(deployment, options.kill)
    while not (deployment.output / "history.json").is_file():
        next(fault, None)
        deployment.check()
        if time.monotonic() - began > options.run_timeout_s:
            raise DeploymentFailed(
                f"no result after {options.run_timeout_s:g} s: {deployment.processes['superlink'].tail()}"
            )
        time.sleep(_POLL_S)


def _result(deployment: _Deployment, seconds: float) -> Deployed:
    import numpy as np

    history = json.loads((deployment.output / "history.json").read_text())
    with np.load(deployment.output / "models.npz") as file:
        models = {name: file[name] for name in file}
    events = sorted([*deployment.seen(), *deployment.events], key=lambda e: e["time"])
    return Deployed(history["rounds"], models, events, seconds, tuple(history["privacy"]))


def killed_mid_round(deployed: Deployed, kill: Kill) -> bool:
    """Whether the node had been asked and had not replied when it was killed."""
    names = {
        (e["event"], e.get("round")): e["time"]
        for e in deployed.events
        if e.get("client") == kill.client
    }
    number = str(kill.round + 1)
    killed, replied = names.get(("killed", number)), names.get(("reply", number))
    return killed is not None and (replied is None or replied > killed)
