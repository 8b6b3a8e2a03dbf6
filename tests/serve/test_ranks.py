"""A real server over real rank processes: ranks killed, drained and resumed by an operator, and clients that notice nothing."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

from serve.support import (  # noqa: E402
    LIMIT_S,
    NAME,
    ranks_process,
    save_model,
    serving,
    wait_until,
)

import jaxmoe  # noqa: E402
from bench._metrics import parse  # noqa: E402
from jaxmoe.cli import main  # noqa: E402

RANKS = 3
PROMPTS = [f"{i} a prompt of its own" for i in range(6)]
BODY = {"model": NAME, "prompt": "Hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and a place for compiled programs beside it."""
    root = tmp_path_factory.mktemp("ranks")
    save_model(root)
    return root


@pytest.fixture(scope="module")
def server(folder):
    """One server for all tests; each leaves it with all ranks back."""
    with ranks_process(folder) as (child, url):
        yield child, url


@pytest.fixture
def url(server):
    child, url = server
    whole(url)
    yield url
    whole(url)


def status_of(url):
    return httpx2.get(f"{url}/ranks").raise_for_status().json()


def states(url):
    return [rank["state"] for rank in status_of(url)["ranks"]]


def pids(url):
    return {rank["rank"]: rank["pid"] for rank in status_of(url)["ranks"] if rank["pid"]}


def whole(url):
    wait_until(lambda: states(url) == ["active"] * RANKS)


def ranks(*args, capsys, url):
    """``jaxmoe ranks``; its exit code, what it prints and what it complains of."""
    code = 0
    try:
        main(["ranks", *map(str, args), "--url", url])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


def is_running(pid):
    """Whether a process is there, other than as a zombie of somebody else."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -- streams that notice nothing ---------------------------------------------------------------------


def streamed(url, disturb=None):
    """The texts and finish reasons of streams of all prompts at once; ``disturb`` once tokens flow."""
    answers, failures, flowing = {}, [], threading.Event()

    def ask(i):
        # A seed: half of them are drawn, and draws must not change either.
        options = {"temperature": i % 2, "seed": i, "max_tokens": 40, "stream": True}
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                text, reason = "", None
                for chunk in client.completions.create(
                    model=NAME, prompt=PROMPTS[i], extra_body={"ignore_eos": True}, **options
                ):
                    text += chunk.choices[0].text
                    reason = chunk.choices[0].finish_reason or reason
                    flowing.set()
                answers[i] = text, reason
        except Exception as error:
            failures.append(error)
            flowing.set()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    assert flowing.wait(LIMIT_S)
    if disturb is not None:
        disturb()
    for thread in threads:
        thread.join(LIMIT_S)
    assert failures == []
    return answers


@pytest.fixture(scope="module")
def undisturbed(server):
    answers = streamed(server[1])
    assert {reason for _, reason in answers.values()} == {"length"}
    return answers


def changes(url):
    """The latest events that are not the server's own tidying up."""
    kinds = ("lost", "joined", "drained")
    return [event for event in status_of(url)["events"] if event["type"] in kinds]


def types(url, after_epoch):
    return [event["type"] for event in changes(url) if event["epoch"] > after_epoch]


@pytest.mark.parametrize(
    "how", ["by the command", pytest.param("by its process id", marks=pytest.mark.slow)]
)
def test_a_killed_rank_is_no_clients_business(url, undisturbed, capsys, how):
    before, pid = status_of(url), pids(url)[1]

    def kill():
        if how == "by the command":
            code, _, err = ranks("kill", 1, capsys=capsys, url=url)
            assert (code, err) == (0, "")
        else:
            os.kill(pid, signal.SIGKILL)

    assert streamed(url, kill) == undisturbed
    wait_until(lambda: not is_running(pid))
    wait_until(lambda: types(url, before["epoch"]) == ["lost", "joined"])
    after = status_of(url)
    lost, joined = changes(url)[-2:]
    assert lost["ranks"] == joined["ranks"] == [1]
    assert lost["epoch"] < joined["epoch"] <= after["epoch"]
    assert lost["seconds"] >= sum(lost["phases"].values()) * 0.99 > 0
    assert after["ranks"][1]["incarnation"] > before["ranks"][1]["incarnation"]
    for rank in (0, 2):  # the survivors have compiled nothing
        assert after["ranks"][rank]["compiles"] == before["ranks"][rank]["compiles"]
    assert streamed(url) == undisturbed


@pytest.mark.slow
def test_a_rank_is_drained_and_resumed_under_load(url, undisturbed, capsys):
    def drain():
        code, out, err = ranks("drain", 2, "--timeout-s", 60, capsys=capsys, url=url)
        assert (code, err) == (0, "") and "drained" in out

    epoch = status_of(url)["epoch"]
    assert streamed(url, drain) == undisturbed
    assert states(url) == ["active", "active", "drained"]
    assert 2 not in pids(url)
    assert types(url, epoch) == ["drained"]
    code, _, err = ranks("drain", 2, capsys=capsys, url=url)
    assert code == 1 and "rank 2 is drained; to drain it, it must be active" in err
    assert streamed(url) == undisturbed
    code, out, err = ranks("resume", 2, capsys=capsys, url=url)
    assert (code, err) == (0, "") and "starting" in out
    whole(url)
    assert streamed(url) == undisturbed


@pytest.mark.slow
def test_while_experts_are_missing_requests_get_503_and_what_is_missing(url, undisturbed):
    """Of three ranks with six slots each two are needed for eight experts."""
    for rank in (0, 1):
        os.kill(pids(url)[rank], signal.SIGKILL)
    wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
    readiness = httpx2.get(f"{url}/readyz").json()
    assert readiness["status"] == "coverage_lost" and "expert" in readiness["reason"]
    assert httpx2.get(f"{url}/healthz").status_code == 200
    response = httpx2.post(f"{url}/v1/completions", json=BODY, timeout=LIMIT_S)
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    error = response.json()["error"]
    assert error["code"] == "coverage_lost" and "expert" in error["message"]
    assert "\n" not in error["message"]
    assert parse(httpx2.get(f"{url}/metrics").text)["jaxmoe_coverage_lost", ()] == 1
    whole(url)
    assert httpx2.get(f"{url}/readyz").status_code == 200
    assert streamed(url) == undisturbed


# -- what an operator sees ---------------------------------------------------------------------------


def test_the_list_is_the_servers(url, capsys):
    code, out, err = ranks("list", capsys=capsys, url=url)
    assert (code, err) == (0, "")
    assert f"{RANKS} of {RANKS} ranks active" in out
    for rank, pid in pids(url).items():
        assert any(line.split()[:2] == [str(rank), "active"] for line in out.splitlines())
        assert str(pid) in out
    code, out, err = ranks("list", "--json", capsys=capsys, url=url)
    assert (code, err) == (0, "") and json.loads(out) == status_of(url)


def test_the_dashboards_stream_has_the_list_too(url):
    with httpx2.stream("GET", f"{url}/events") as response:
        lines = response.iter_lines()
        assert "event: snapshot" in lines  # takes all lines up to this one
        snapshot = json.loads(next(lines).removeprefix("data: "))
    assert snapshot["cluster"] == status_of(url)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["kill", RANKS], ["rank must be in 0..2", "got '3'"]),
        (["resume", 0], ["rank 0 is active", "must be drained"]),
        (["drain"], ["drain takes the number of a rank", "got None"]),
        (["list", 1], ["list takes no rank", "got 1"]),
        (["drain", 1, "--timeout-s", "-1"], ["timeout-s must be >= 0", "-1"]),
    ],
)
def test_an_operators_mistake_is_one_line(url, capsys, args, words):
    code, out, err = ranks(*args, capsys=capsys, url=url)
    assert (code, out) == (1, "") and err.count("\n") == 1 and err.startswith("error: ")
    assert all(word in err for word in words)


def test_metrics_tell_of_the_ranks(url):
    samples = parse(httpx2.get(f"{url}/metrics").text)
    status = status_of(url)
    assert samples["jaxmoe_epoch", ()] == status["epoch"]
    assert samples["jaxmoe_ranks_active", ()] == RANKS
    assert samples["jaxmoe_expert_copies_min", ()] == status["min_copies"] >= 1
    for rank in status["ranks"]:
        label = (("rank", str(rank["rank"])),)
        assert samples["jaxmoe_rank_up", label] == 1
        assert samples["jaxmoe_rank_compiles", label] == rank["compiles"] > 0
    for event in status["events"]:
        kind = ("type", event["type"])
        assert samples["jaxmoe_rank_changes_total", (kind,)] >= 1
        assert samples["jaxmoe_rank_change_seconds_total", (kind,)] >= event["seconds"]
        for phase, seconds in event["phases"].items():
            key = (("phase", phase), kind)
            assert samples["jaxmoe_rank_change_phase_seconds_total", key] >= seconds


def test_a_page_of_another_site_cannot_operate_ranks(url):
    """A form sends its own content type, and anything else needs a preflight, which is not answered."""
    form = httpx2.post(f"{url}/ranks/0/kill", data={"a": "b"})
    assert form.status_code == 415
    assert (
        httpx2.post(f"{url}/ranks/0/kill", json={}, headers={"host": "evil.example"}).status_code
        == 403
    )
    assert httpx2.get(f"{url}/ranks/0/kill").status_code == 405
    assert states(url) == ["active"] * RANKS


# -- servers without ranks, and without the right to operate them -------------------------------------


def test_a_server_with_one_device_says_that_it_has_no_ranks(engine, capsys):
    with serving(engine) as url:
        for args in (["list"], ["drain", 0]):
            code, out, err = ranks(*args, capsys=capsys, url=url)
            assert (code, out) == (1, "") and "--ranks N" in err and err.count("\n") == 1


def test_without_the_key_nobody_operates_ranks(engine, capsys, monkeypatch):
    monkeypatch.delenv("JAXMOE_API_KEY", raising=False)
    with serving(engine, api_key="s3cret") as url:
        code, _, err = ranks("kill", 0, capsys=capsys, url=url)
        assert code == 1 and "the API key is missing or wrong" in err
        code, _, err = ranks("kill", 0, "--api-key", "s3cret", capsys=capsys, url=url)
        assert code == 1 and "--ranks N" in err  # the key is right, there are no ranks
        monkeypatch.setenv("JAXMOE_API_KEY", "s3cret")
        assert "--ranks N" in ranks("list", capsys=capsys, url=url)[2]


def test_a_server_that_others_reach_without_a_key_lets_nobody_operate_ranks(engine, capsys):
    with serving(engine, operable=False) as url:
        for args in (["list"], ["kill", 0]):
            code, _, err = ranks(*args, capsys=capsys, url=url)
            assert code == 1 and "--api-key" in err and err.count("\n") == 1


def test_addresses_where_no_server_is(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, err = ranks("list", capsys=capsys, url=address)
    assert code == 1 and "no server answers" in err and "jaxmoe serve" in err
    code, _, err = ranks("list", capsys=capsys, url="localhost:8000")
    assert code == 1 and "--url must begin with http" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--spares", "1"], ["--ranks must be at least 2 with --spares", "got 1"]),
        (["--ranks", "2", "--speculative-tokens", "1"], ["speculative_tokens=1", "use 0"]),
        (["--ranks", "0"], ["ranks must be >= 1", "got 0"]),
    ],
)
def test_options_that_make_no_ranks_are_one_line(args, words):
    command = [sys.executable, "-c", "from jaxmoe.cli import main; main()", "serve", "tiny"]
    result = subprocess.run(
        [*command, "--random-weights", *args],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(jaxmoe.__file__))},
        check=False,
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words)


# -- beginning and end -------------------------------------------------------------------------------


@pytest.mark.slow
def test_when_the_server_is_killed_its_ranks_go_too_and_it_can_be_started_again(
    folder, undisturbed
):
    with ranks_process(folder) as (child, url):
        running = pids(url)
        assert len(running) == RANKS
        command = pathlib.Path(f"/proc/{running[0]}/cmdline").read_text().split("\0")
        sockets = pathlib.Path(next(word for word in command if word.endswith("/control"))).parent
        assert sockets.is_dir()
        child.kill()
        wait_until(lambda: not any(map(is_running, running.values())), limit_s=10)
        assert not sockets.exists()
    with ranks_process(folder) as (child, url):
        assert streamed(url) == undisturbed


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_leaves_no_process(folder, undisturbed):
    with ranks_process(folder) as (child, url):
        running = pids(url)
        assert streamed(url, lambda: child.send_signal(signal.SIGTERM)) == undisturbed
        assert child.wait(LIMIT_S) == 0
        assert not any(map(is_running, running.values()))
