"""Processes that hang while they start, do not listen, or stop in the middle of a message; and callers that have no business."""

import pathlib
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
from elastic.stubs import DEAF, HANGS, LARGE, MUMBLES, READY

from jaxmoe.elastic.cluster.supervisor import MOST_STARTS, Member, Supervisor
from jaxmoe.elastic.cluster.team import RankFailed, Team
from jaxmoe.elastic.membership import Membership

WAIT_S = 60


def _until(condition) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """Makes supervisors of stubs."""
    made = []
    tests = pathlib.Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parent}")

    def make(**limits) -> Supervisor:
        limits = {"silence_s": 0.5, "start_s": WAIT_S, **limits}
        made.append(Supervisor(tmp_path, lambda: None, module="elastic.stubs", **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def _take(supervisor: Supervisor, rank: int) -> Member:
    supervisor.launch(rank, "setup")
    _until(lambda: supervisor.ready)
    (member,) = supervisor.ready
    assert supervisor.take(member)
    return member


def test_a_process_that_hangs_while_it_starts_is_killed_and_given_up_in_the_end(supervise):
    supervisor = supervise(start_s=0.3)
    supervisor.launch(HANGS, "setup")
    pids = set()

    def given_up() -> bool:
        pids.update(member.process.pid for member in supervisor.starting)
        return HANGS in supervisor.given_up

    _until(given_up)
    assert len(pids) == MOST_STARTS and not supervisor.waiting


def test_a_caller_that_says_nothing_or_does_not_know_the_key_is_in_nobodys_way(supervise, tmp_path):
    supervisor = supervise()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "control"))
        with pytest.raises(AuthenticationError):
            Client(str(tmp_path / "control"), authkey=b"guess")
        _take(supervisor, READY).end()


def test_who_does_not_read_what_it_is_sent_is_killed(supervise):
    member = _take(supervise(), DEAF)
    assert not all(member.send(LARGE) for _ in range(100))
    _until(lambda: not member.alive)
    assert not member.send("one more")
    member.end()


def test_who_stops_in_the_middle_of_a_message_has_failed(supervise):
    member = _take(supervise(), MUMBLES)
    active = tuple(rank == MUMBLES for rank in range(4))
    membership = Membership(0, active, tuple(0 if on else -1 for on in active))
    team = Team(membership, silence_s=WAIT_S)
    team.members[MUMBLES] = member
    with pytest.raises(RankFailed, match=rf"\[{MUMBLES}\]"):
        team.gather("done", WAIT_S)
    member.end()


def test_nothing_is_left_after_the_end(supervise, tmp_path):
    before = threading.active_count()
    supervisor = supervise()
    supervisor.launch(READY, "setup")
    _until(lambda: supervisor.ready)
    (member,) = supervisor.ready
    supervisor.close()
    supervisor.close()  # once is enough
    assert not member.alive and not supervisor.waiting
    _until(lambda: threading.active_count() <= before)
    assert not (tmp_path / "control").exists()
    supervisor.launch(READY, "setup")
    assert not supervisor.waiting
