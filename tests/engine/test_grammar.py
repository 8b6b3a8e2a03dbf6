"""Output of a given form: which tokens may come, on bytes and on a tokenizer with special tokens, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest

pytest.importorskip("llguidance")

import jaxmoe  # noqa: E402
from jaxmoe.engine import Engine, EngineOptions, SamplingParams, grammar  # noqa: E402
from jaxmoe.engine.grammar import Chain, Json, Literal, OneOf, Repeat, Text  # noqa: E402
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer  # noqa: E402

CONFIG = jaxmoe.presets["tiny"].replace(num_hidden_layers=2, num_nextn_predict_layers=0)
EOS = 257


def started(form, tokenizer=None, config=CONFIG, eos=EOS):
    return grammar.start(form, tokenizer or ByteTokenizer(), config, frozenset([eos]))


def allowed(state, after=(), size=CONFIG.vocab_size):
    """Ids that may come next."""
    bias = np.zeros(size, np.float32)
    state.forbid(bias, after)
    assert set(np.unique(bias)) <= {0.0, -np.inf}
    return set(np.flatnonzero(bias == 0).tolist())


def fits(form, text, *, end=None):
    """Whether ``text`` has the form; ``end``: whether it then ends by itself."""
    state = started(form)
    for byte in text.encode():
        if state.complete or byte not in allowed(state):
            return False
        state.take(byte)
    if end is not None:
        assert state.complete == end, text
    return EOS in allowed(state)


TAGGED = Chain((Literal("<a>"), Text("</a>", without=("bad", "a>"), least=1, most=4)))


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Literal('"\\\n\x00\x7f/é｜𝄞'), ['"\\\n\x00\x7f/é｜𝄞'], ["", '"']),
        (OneOf((Literal("a"), Literal("bc"))), ["a", "bc"], ["", "b", "abc"]),
        (Chain((OneOf((Literal("a"), Literal(""))), Literal("b"))), ["ab", "b"], ["a", "aab"]),
        (Chain((Repeat(Literal("ab")), Literal("."))), ["ab.", "ababab."], [".", "aba."]),
        (Text("END"), ["END", "xyzEND", "EEND", "\n\0END"], ["", "EN", "xENDy", "ENDEND"]),
        (Text(None, without=("no",)), ["", "n", "o", "a\nb"], ["no", "a no b"]),
        (
            TAGGED,
            ["<a>x</a>", "<a><</a>", "<a>four</a>"],
            ["<a></a>", "<a>five5</a>", "<a>bad</a>"],
        ),
        (Json('{"type": "integer"}'), ["3", "-12"], ["1.5", "", '"3"']),
        (Json("true"), ["3", '{"a":[1,2]}'], ['{"a": 1}', "{"]),
        (
            Json('{"type": "array", "items": {"type": "integer"}}', spaced=True),
            ["[]", "[1, 2]"],
            ["[1,2]", "[1 , 2]"],
        ),
    ],
)
def test_a_form_takes_what_it_says_and_nothing_else(form, good, bad):
    for text in good:
        assert fits(form, text), text
    for text in bad:
        assert not fits(form, text), text


def test_a_form_with_an_end_of_its_own_is_complete_there_and_another_waits_for_the_end_token():
    assert fits(Text("END"), "xEND", end=True)
    assert fits(Literal("ab"), "ab", end=True)
    assert fits(Text(None), "x", end=False)
    either = OneOf((Chain((Text("\n\n<go>\n"), Literal("!"))), Text(None, without=("\n\n<go",))))
    assert fits(either, "hm\n\n<g", end=False)
    assert fits(either, "hm\n\n<go>\n!", end=True)
    assert not fits(either, "hm\n\n<go>\n?")
    assert not fits(either, "hm\n\n<gone")  # What begins like the end must be one.


def test_a_guess_is_taken_for_granted_and_then_forgotten():
    state = started(
        Json('{"type": "object", "properties": {"a": {"enum": [7, 8]}}, "required": ["a"]}')
    )
    first = allowed(state)
    assert allowed(state, list(b'{"a":')) == set(b"78")
    assert allowed(state, list(b'{"b')) is not None  # It may not come: no error, no meaning.
    assert allowed(state, [*b'{"a":7}', EOS]) is not None
    assert allowed(state) == first == set(b"{")
    for byte in b'{"a"':
        state.take(byte)
    assert allowed(state, list(b":8")) == set(b",}")
    assert allowed(state) == set(b":")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A tokenizer of merged bytes, with special tokens and added ones that are none."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["thinking things through", "</thing>"] * 9, trainer)
    made.add_special_tokens([AddedToken("<end>", special=True)])
    added = [AddedToken(text, special=False) for text in ("<think>", "</think>", "|MARK|")]
    made.add_tokens(added)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return FileTokenizer(path)


def test_text_that_is_a_special_token_is_that_token(tokens):
    form = Chain((Text("</think>"), Literal("a</think>b|MARK|"), Text("|MARK|")))
    config = CONFIG.replace(vocab_size=tokens.vocab_size + 3)
    (end,) = tokens.encode("<end>", bos=False)

    def walk(ids):
        state = started(form, tokens, config, end)
        for token in ids:
            if token not in allowed(state, size=config.vocab_size):
                return None
            state.take(token)
        return state.complete

    (marker,) = tokens.encode("</think>", bos=False)
    ids = tokens.encode("the thing</think>a</think>b|MARK|more|MARK|", bos=False)
    assert ids.count(marker) == 2 and walk(ids) is True
    # Spelled out it is not the token; and what is spelled out would end the text as well.
    spelled = [i for part in ("</", "think", ">") for i in tokens.encode(part, bos=False)]
    assert tokens.decode(spelled) == "</think>"
    assert walk([*tokens.encode("the thing", bos=False), *spelled]) is None
    assert walk([*tokens.encode("x</think>a", bos=False), *spelled]) is None


def test_a_text_may_not_end_in_what_has_a_special_token_inside(tokens):
    config = CONFIG.replace(vocab_size=tokens.vocab_size)
    with pytest.raises(ValueError, match=r"^form: the end '<a><think>' of a text has a special"):
        started(Text("<a><think>"), tokens, config, 0)


# -- what native code must not see -------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    params = jaxmoe.init_params(CONFIG, jax.random.key(0))
    options = EngineOptions(max_running=2, max_step_tokens=16, max_length=128)
    with Engine(params, CONFIG, options=options) as engine:
        yield engine


def chain(references, depth):
    """References one after another, each inside so many arrays."""

    def wrapped(schema):
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    parts = {f"a{i}": wrapped({"$ref": f"#/$defs/a{i + 1}"}) for i in range(references)}
    return {"$defs": parts | {f"a{references}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


TOO_LARGE = [
    ({"const": -(2**63)}, r"must have no numbers beyond 2\^53; got -9223372036854775808"),
    ({"enum": [1, {"a": [2**53 + 1]}]}, "must have no numbers beyond"),
    ({"maximum": 1e300}, r"must have no numbers beyond 2\^53; got 1e\+300"),
    ({"maximum": float("nan")}, "must have no numbers beyond"),
    (chain(100, 10), r"must have at most 1024 levels.*; got 14 x 102"),
    (chain(1000, 1), "must have at most 1024 levels"),
    ({"enum": ["x" * 100_000]}, "must have at most 65536 characters; got 100014"),
]


@pytest.mark.parametrize(("schema", "rule"), TOO_LARGE)
@pytest.mark.parametrize("as_form", [False, True])
def test_a_schema_beyond_the_limits_is_refused_by_submit(engine, schema, rule, as_form):
    text = json.dumps(schema)
    with pytest.raises(ValueError, match=rf"^json_schema {rule}"):
        form = {"form": Chain((Literal("a"), Json(text)))} if as_form else {"json_schema": text}
        engine.submit("Hello", SamplingParams(4, **form))


@pytest.mark.parametrize("schema", [chain(20, 20), chain(0, 400), chain(200, 1)])
def test_a_schema_within_the_limits_is_taken_by_submit(engine, schema):
    params = SamplingParams(4, json_schema=json.dumps(schema))
    assert engine.submit("Hello", params).result(60).finish_reason in ("stop", "length")


def test_json_that_is_nested_beyond_pythons_own_limit_is_refused(engine):
    with pytest.raises(ValueError, match="^json_schema is no JSON"):
        engine.submit("Hello", SamplingParams(4, json_schema="[" * 60_000))


def test_too_many_schemas_together_are_refused(engine):
    parts = tuple(Json(json.dumps({"enum": ["x" * 60_000, i]})) for i in range(5))
    with pytest.raises(ValueError, match="^Schemas must together have at most 262144"):
        engine.submit("Hello", SamplingParams(4, form=OneOf(parts)))


def test_the_schema_that_cannot_be_enforced_is_named(engine):
    form = OneOf((Json("{}", "first"), Json('{"type": "nothing"}', "second")))
    with pytest.raises(
        ValueError, match="^second cannot be enforced: .*nothing.*; simplify"
    ) as caught:
        engine.submit("Hello", SamplingParams(4, form=form))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^form cannot be enforced"):
        engine.submit("Hello", SamplingParams(4, form=Text("x", least=3, most=2)))


# A million characters of one regular expression, with nothing before it and behind one that the model chooses.
HUGE = {"type": "string", "pattern": "^(a{1000}){1000}$"}
HUGE_LATER = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}, "s": HUGE},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("as_form", [False, True])
def test_a_schema_whose_first_token_takes_too_much_work_is_refused_by_submit(engine, as_form):
    text = json.dumps(HUGE)
    form = {"form": Chain((Literal("a"), Json(text, "mine")))} if as_form else {"json_schema": text}
    name = "mine" if as_form else "json_schema"
    rule = f"^{name} cannot be enforced: .*too many expressions.*; simplify the schema.$"
    with pytest.raises(ValueError, match=rule) as caught:
        engine.submit("Hello", SamplingParams(4, **form))
    assert "\n" not in str(caught.value)


def test_a_form_that_takes_too_much_work_later_is_in_error_and_not_complete():
    state = started(Json(json.dumps(HUGE_LATER)))
    for byte in b'{"n":1':
        assert byte in allowed(state) and state.error is None
        state.take(byte)
    for byte in b',"s":"aa':
        allowed(state)
        state.take(byte)
    assert "too many expressions" in state.error and "\n" not in state.error
    assert not state.complete


def test_a_form_that_takes_too_much_work_later_ends_its_request_alone_and_in_error(engine):
    other = engine.submit("Hello", SamplingParams(40, ignore_eos=True))
    chunks = list(engine.stream("Hello", SamplingParams(40, json_schema=json.dumps(HUGE_LATER))))
    assert chunks[-1].finish_reason == "error" and "too many expressions" in chunks[-1].error
    text = "".join(chunk.text for chunk in chunks)
    assert re.match(r'\{"n":[12]', text), text
    result = other.result(60)
    assert result.finish_reason == "length" and len(result.token_ids) == 40


@pytest.mark.parametrize("size", [10, 50, 100])
def test_long_patterns_that_are_little_work_are_taken(size):
    state = started(Json(json.dumps({"type": "string", "pattern": f"^(a{{{size}}}){{{size}}}$"})))
    for byte in b'"' + b"a" * size**2 + b'"':
        assert byte in allowed(state)
        state.take(byte)
    assert state.complete and state.error is None


def test_a_schema_and_a_form_exclude_each_other():
    with pytest.raises(ValueError, match="^form and json_schema must not both be given"):
        SamplingParams(form=Literal("a"), json_schema="{}")


@pytest.mark.misuse
def test_what_is_no_form_is_refused():
    with pytest.raises(TypeError, match="^form must be a form of jaxmoe.engine.grammar or None"):
        SamplingParams(form="a")


def test_a_model_writes_what_the_form_says(engine):
    form = Chain(
        (Literal("n="), Json('{"enum": [1, 22, 333]}'), Text(";", most=3), Repeat(Literal("!")))
    )
    params = [
        SamplingParams(24, temperature=1.0, seed=i, form=form, ignore_eos=True) for i in range(6)
    ]
    results = engine.generate(["Hello"] * 6, params)
    for result in results:
        assert result.text.startswith("n=") and result.text[2:].rstrip("!").endswith(";")
    assert len({result.text for result in results}) > 1
