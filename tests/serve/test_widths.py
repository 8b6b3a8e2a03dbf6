"""A checkpoint in SEFP behind the API: every request at its width, and one line for a width that there isn't."""

import httpx2
import jax
import numpy as np
import pytest

pytest.importorskip("starlette")

from serve.support import CONFIG, LIMIT_S, MODEL, serving  # noqa: E402

import jaxmoe  # noqa: E402
import quant  # noqa: E402
from jaxmoe import checkpoint  # noqa: E402
from jaxmoe.cli.serve import _ONE_DEVICE, _engine, _weights  # noqa: E402
from jaxmoe.elastic import ClusterOptions  # noqa: E402
from jaxmoe.engine import Engine, EngineOptions  # noqa: E402

OPTIONS = EngineOptions(max_running=2, max_step_tokens=16, max_length=128, widths=(3, 8), width=8)
PROMPT, NEW = "def f(x):", 6


@pytest.fixture(scope="module")
def stored():
    params = jaxmoe.init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)
    return quant.quantize_params(params)


@pytest.fixture(scope="module")
def directory(stored, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / MODEL
    checkpoint.save_sefp(path, stored, CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def url(directory):
    """As ``jaxmoe serve`` makes the engine."""
    weights = _weights(directory, False, 0, "float32")
    with _engine(directory, weights, OPTIONS, _ONE_DEVICE) as engine, serving(engine) as url:
        yield url


def ask(url, **more):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 0} | more
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=LIMIT_S)


@pytest.mark.parametrize("width", [3, 8, None])
def test_a_request_gets_the_tokens_of_its_width(url, stored, width):
    tokens = np.frombuffer(PROMPT.encode(), np.uint8)[None].astype(np.int32)
    expected = jaxmoe.generate(stored, CONFIG, tokens, NEW, width=width or 8)[0].tolist()
    answer = ask(url, **({} if width is None else {"width": width}))
    assert answer.status_code == 200, answer.text
    answer = answer.json()
    assert answer["usage"]["width"] == (width or 8)
    assert answer["usage"]["completion_tokens"] == NEW
    known = [chr(t) if t < 128 else None for t in expected]
    given = answer["choices"][0]["logprobs"]["tokens"]
    assert [g for g, k in zip(given, known, strict=True) if k] == [k for k in known if k]


def test_the_usage_of_prompts_to_which_a_policy_gave_other_widths_names_none(stored):
    def policy(prompt, sampling):
        return 3 if len(prompt) == 1 else 8

    with Engine(stored, CONFIG, options=OPTIONS, width_policy=policy) as engine:
        with serving(engine) as url:
            usages = [
                ask(url, prompt=prompts, max_tokens=1).json()["usage"]
                for prompts in (["a", "b"], ["cd", "ef"], ["a", "cd"])
            ]
    assert [usage.get("width") for usage in usages] == [3, 8, None]


def test_the_model_says_which_widths_there_are(url):
    model = httpx2.get(f"{url}/v1/models").json()["data"][0]
    assert model["id"] == MODEL and model["widths"] == [3, 8]
    assert "jaxmoe_width_steps_total" in httpx2.get(f"{url}/metrics").text


def test_another_width_is_answered_with_one_line(url):
    answer = ask(url, width=5)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "width"
    assert error["message"] == "width must be one of 3, 8; got 5. Leave it out for the default."


def test_ranks_do_not_serve_widths_and_say_so(directory):
    weights = _weights(directory, False, 0, "float32")
    with pytest.raises(ValueError, match="--ranks must be 1 with weights in SEFP"):
        _engine(directory, weights, EngineOptions(), ClusterOptions(ranks=2))


def test_a_preset_is_encoded_for_a_server_that_is_asked_for_widths():
    weights = _weights(MODEL, True, 0, "float32")
    with _engine(MODEL, weights, OPTIONS, _ONE_DEVICE, {"lm_head": 6}) as engine:
        assert engine.widths == (3, 8)
        assert engine._runner._params[3]["lm_head"]["weight"].width == 6
