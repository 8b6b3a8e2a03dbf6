"""The curl examples of README.md and docs/serving.md, as they stand there but for the port."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

pytest.importorskip("starlette")

ROOT = pathlib.Path(__file__).parents[2]


def examples(page):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    return [block for block in blocks if block.startswith("curl ")]


README, SERVING = examples("README.md"), examples("docs/serving.md")


def run(command, url):
    bash = shutil.which("bash")
    if bash is None or shutil.which("curl") is None:
        pytest.skip("bash or curl is not installed")
    assert "http://127.0.0.1:8000" in command
    script = command.replace("http://127.0.0.1:8000", url)
    result = subprocess.run([bash, "-c", script], capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def check_events(text):
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    bodies = [json.loads(event) for event in events[:-1]]
    assert bodies[-1]["usage"]["completion_tokens"] > 0
    assert {body["object"] for body in bodies} == {"chat.completion.chunk"}


def check_body(command, body):
    assert "error" not in body
    if "/readyz" in command:
        assert body == {"status": "ready"}
    elif "/v1/models" in command:
        assert [model["id"] for model in body["data"]] == ["tiny"]
    else:
        assert body["usage"]["completion_tokens"] > 0
    if "json_schema" in command:
        answer = json.loads(body["choices"][0]["message"]["content"])
        assert isinstance(answer["prime"], bool)
    if "tool_choice" in command:
        (call,) = body["choices"][0]["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["day"] in ("Mon", "Tue", "Wed") and 1 <= arguments["people"] <= 9
    if '"n": 2' in command:
        assert len(body["choices"]) == 2


def test_the_pages_have_examples_of_every_kind():
    assert ["chat" in command for command in README] == [True, False]
    everything = "".join(SERVING)
    assert len(SERVING) == 8
    for word in (
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/metrics",
        "stream",
        "tools",
    ):
        assert word in everything


@pytest.mark.parametrize("command", README + SERVING)
def test_a_curl_example_works_as_it_stands(command, url):
    output = run(command, url)
    if "/metrics" in command:
        assert "jaxmoe_requests_running 0.0" in output
    elif '"stream": true' in command:
        check_events(output)
    else:
        check_body(command, json.loads(output))
