"""What can be served: several ranks, and a Hugging Face directory with a tokenizer of its own."""

import json

import httpx2
import jax
import jsonschema
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from serve.support import (  # noqa: E402
    CONFIG,
    HELLO,
    LIMIT_S,
    MODEL,
    process,
    serving,
    wait_until,
)

import jaxmoe  # noqa: E402
from bench._metrics import parse  # noqa: E402
from jaxmoe import chat, checkpoint  # noqa: E402
from jaxmoe.cli._models import load  # noqa: E402
from jaxmoe.engine import Engine, EngineOptions, SamplingParams  # noqa: E402
from jaxmoe.tokenizer import FileTokenizer, load_tokenizer  # noqa: E402

PATIENCE = ["--silence-s", "20", "--deadline-s", "300"]


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)


# -- ranks -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_answer_as_one_and_their_metrics_agree_with_the_client():
    config = jaxmoe.presets[MODEL]
    options = {"temperature": 0, "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    prompts = [f"{i} a prompt of its own" for i in range(6)]
    answers = {}
    for ranks in (1, 2):
        arguments = ["--ranks", str(ranks), "--max-length", "256"]
        # Steps compile within their deadline, without warm-up, and ranks may be silent meanwhile.
        arguments += PATIENCE if ranks > 1 else []
        with process(*arguments) as (_, url), client_of(url) as client:
            answer = client.completions.create(model=MODEL, prompt=prompts, **options)
            answers[ranks] = [choice.text for choice in answer.choices]
            wait_until(lambda: metrics(url)["jaxmoe_requests_running", ()] == 0)
            found = metrics(url)
        usage = answer.usage
        assert found["jaxmoe_prompt_tokens_total", ()] == usage.prompt_tokens
        assert found["jaxmoe_generated_tokens_total", ()] == usage.completion_tokens == 30
        load = {key[1]: n for key, n in found.items() if key[0] == "jaxmoe_expert_tokens_total"}
        # Every token but a request's last goes through each layer once, to so many experts.
        tokens = usage.prompt_tokens + usage.completion_tokens - len(prompts)
        layers = {dict(labels)["layer"] for labels in load}
        assert len(load) == len(layers) * config.n_routed_experts
        assert sum(load.values()) == tokens * config.num_experts_per_tok * len(layers)
    assert answers[1] == answers[2]


def metrics(url):
    return parse(httpx2.get(f"{url}/metrics").text)


# -- a directory of Hugging Face's layout ------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
END = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with random weights, and a tokenizer with V3.2's special tokens and some merges."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("checkpoints") / "own-model"
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    words = 'function calls: parameter name="name" string="true", true false {"name": "ok"}'
    made.train_from_iterator([words] * 9, trainer)
    turns = [AddedToken(text, special=True) for text in chat.SPECIAL_TOKENS[:4]]
    made.add_special_tokens(turns)
    made.add_tokens([AddedToken(text, special=False) for text in chat.SPECIAL_TOKENS[4:]])
    eos = made.token_to_id(END)
    config = CONFIG.replace(vocab_size=made.get_vocab_size() + 5, eos_token_id=eos)
    checkpoint.save_hf(path, jaxmoe.init_params(config, jax.random.key(1)), config)
    made.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def own(directory):
    """(engine, its server's address) for the directory, loaded as the command line does."""
    params, config = load(str(directory), mtp=False)
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, FileTokenizer)
    options = EngineOptions(max_running=4, max_step_tokens=64, max_length=2048)
    with Engine(params, config, tokenizer, options) as engine, serving(engine) as url:
        yield engine, url


def test_a_directorys_tokenizer_encodes_the_chat_with_its_special_tokens(own):
    engine, url = own
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    with client_of(url) as client:
        answer = client.chat.completions.create(**options, extra_body={"ignore_eos": True})
    prompt = engine.tokenizer.encode(chat.encode(HELLO), bos=False)
    assert len(prompt) < len(chat.encode(HELLO).encode()) // 4  # Turn tokens are one id each.
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    (expected,) = engine.generate([prompt], params)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(prompt)


def test_json_and_calls_are_enforced_with_a_directorys_tokenizer(own):
    _, url = own
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 1000, "n": 4, "seed": 0}
    with client_of(url) as client:
        answer = client.chat.completions.create(response_format=form, **options)
        for choice in answer.choices:
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        choice = {"type": "function", "function": {"name": "note"}}
        answer = client.chat.completions.create(tools=[TOOL], tool_choice=choice, **options)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name == "note"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    # Fewer tokens than bytes: markup is written with merged and special tokens.
    assert answer.usage.completion_tokens / 4 < 250


def test_the_command_serves_a_directory_under_its_name(directory):
    with process(model=(str(directory),)) as (_, url), client_of(url) as client:
        (model,) = client.models.list().data
        assert model.id == "own-model"
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        answer = client.chat.completions.create(
            model="own-model", messages=HELLO, response_format=form, max_tokens=200, seed=3
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


@pytest.mark.slow
def test_ranks_load_a_directory_as_one_device_does(own, directory):
    _, url = own
    options = {"messages": HELLO, "max_tokens": 16, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    with client_of(url) as client:
        expected = client.chat.completions.create(model=MODEL, **options)
    sizes = "--ranks 2 --max-running 4 --max-step-tokens 4 --max-length 256".split()
    with process(*sizes, *PATIENCE, model=(str(directory),)) as (_, url), client_of(url) as client:
        answer = client.chat.completions.create(model="own-model", **options)
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.usage == expected.usage
