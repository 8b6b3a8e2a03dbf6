"""What a deployment needs before any node starts: certificates, faults, experiments as text; processes that end with all below them."""

import os
import socket
import ssl
import sys
import threading
import time

import pytest

pytest.importorskip("cryptography")

from fed import deployment
from fed.certificates import make_certificates
from fed.deployment import Kill
from fed.experiment import Experiment


def test_a_client_that_trusts_the_authority_can_talk_to_the_server_and_no_other_can(tmp_path):
    paths = make_certificates(tmp_path / "one")
    other = make_certificates(tmp_path / "two")
    assert os.stat(paths["key"]).st_mode & 0o077 == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(paths["certificate"], paths["key"])
    with socket.create_server((deployment.HOST, 0)) as listener:

        def serve():
            for _ in range(2):
                accepted, _ = listener.accept()
                try:
                    with server.wrap_socket(accepted, server_side=True) as s:
                        s.sendall(s.recv(5))
                except (ssl.SSLError, OSError):
                    accepted.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = listener.getsockname()
        try:
            context = ssl.create_default_context(cafile=paths["ca"])
            with socket.create_connection(address) as raw:
                with context.wrap_socket(raw, server_hostname=deployment.HOST) as s:
                    s.sendall(b"hello")
                    assert s.recv(5) == b"hello"
            stranger = ssl.create_default_context(cafile=other["ca"])
            with socket.create_connection(address) as raw:
                with pytest.raises(ssl.SSLCertVerificationError):
                    stranger.wrap_socket(raw, server_hostname=deployment.HOST)
        finally:
            thread.join(10)


def test_an_experiment_survives_being_text():
    one = Experiment(clients=7, models=("mlp:3", "cnn:2"), codec="int8")
    assert Experiment.from_json(one.to_json()) == one
    with pytest.raises(ValueError, match="no experiment"):
        Experiment.from_json('{"clients": 3}')


@pytest.mark.parametrize("text", ["2", "a@1", "1@", "-1@2"])
def test_a_kill_is_client_at_round(text):
    assert Kill.parse("2@1") == Kill(client=2, round=1)
    with pytest.raises(ValueError, match="CLIENT@ROUND"):
        Kill.parse(text)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_process_ends_with_everything_below_it_even_in_another_session(how, tmp_path):
    code = (
        "import subprocess, sys, time, pathlib\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "pathlib.Path('child').write_text(str(p.pid))\n"
        "time.sleep(60)\n"
    )
    process = deployment._Process(
        "x", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ)
    )
    child = tmp_path / "child"
    end = time.monotonic() + 30
    while not (child.is_file() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    pid = int(child.read_text())
    assert deployment._stat(pid)
    getattr(process, how)()
    assert process.ended() is not None
    end = time.monotonic() + 10
    while (fields := deployment._stat(pid)) and fields[0] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    fields = deployment._stat(pid)
    assert fields is None or fields[0] == "Z"
