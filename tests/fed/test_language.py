"""Language models teach each other: what is said, whom to believe, the loss, and a round in which the weak learn from the strong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rapidfuzz")

import jaxmoe
import quant
from fed import language
from fed.compress import TopLogits, top_logits
from fed.language import TransferOptions, lesson, select, transfer
from fed.language_model import (
    Answers,
    Party,
    answers,
    bits_per_byte,
    losses_of,
    rows_of,
    soft_cross_entropy,
)
from jaxmoe.tokenizer import ByteTokenizer

SMALL = jaxmoe.ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, initializer_range=0.05,
)  # fmt: skip
TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat on a mat"]


@pytest.fixture(scope="module")
def party():
    return Party("server", SMALL, ByteTokenizer())


@pytest.fixture(scope="module")
def params():
    return jaxmoe.init_params(SMALL, jax.random.key(0))


def test_rows_predict_every_token_of_a_text_from_those_before_it(party):
    rows = rows_of(TEXTS, party)
    for i, text in enumerate(TEXTS):
        n = rows.lengths[i]
        assert bytes(rows.targets[i, :n].tolist()).decode() == text
        assert (
            rows.inputs[i, 0] == 256
            and rows.inputs[i, 1:n].tolist() == rows.targets[i, : n - 1].tolist()
        )
    with pytest.raises(ValueError, match="must not be empty; 1 of 2"):
        rows_of(["a", ""], party)


def test_bits_per_byte_are_those_of_the_models_own_logits(party, params):
    rows = rows_of(TEXTS, party)
    bits = 0.0
    for text in TEXTS:  # one by one, without padding
        tokens = np.array([[256, *text.encode()]], np.int32)
        logits = jax.nn.log_softmax(jaxmoe.forward(params, SMALL, tokens[:, :-1]))
        bits -= sum(float(logits[0, t, b]) for t, b in enumerate(text.encode())) / np.log(2)
    got = bits_per_byte(party, params, rows, batch_size=2)
    assert got == pytest.approx(bits / sum(map(len, TEXTS)), rel=1e-4)


def test_a_quantised_party_says_what_its_stored_weights_say(params):
    device = Party("device", SMALL, ByteTokenizer(), width=4)
    rows = rows_of(TEXTS, device)
    stored = quant.quantize_params(params, 4)
    logits = jaxmoe.forward(stored, SMALL, rows.inputs)
    said = answers(device, params, rows, 5)
    wanted = top_logits(logits, 5)
    np.testing.assert_allclose(said.top.log_probs, wanted.log_probs, atol=2e-5)
    assert device.nbytes(params) == quant.nbytes(stored) < 0.5 * quant.nbytes(params)


def test_the_loss_over_few_tokens_is_the_cross_entropy_with_the_distribution_that_they_stand_for(
    rng,
):
    teacher = top_logits(jnp.asarray(rng.standard_normal((2, 3, 11)) * 2, jnp.float32), 4)
    for temperature in (1.0, 2.0):
        student = jax.nn.log_softmax(
            jnp.asarray(rng.standard_normal((2, 3, 11)), jnp.float32) / temperature
        )
        target = jax.nn.softmax(teacher.dense() / temperature)
        got = soft_cross_entropy(student, teacher.log_probs, teacher.ids, temperature)
        np.testing.assert_allclose(got, -(target * student).sum(-1), rtol=1e-4)


def test_of_all_answers_the_best_one_is_believed_text_by_text():
    losses = np.array([[1.0, 3.0, 2.0], [2.0, 1.0, 2.5]], np.float32)
    np.testing.assert_array_equal(select(losses, "greater"), [[1, 0], [0, 1], [1, 0]])
    quality = np.exp(-losses.T)
    soft = np.exp(quality) / np.exp(quality).sum(1, keepdims=True)
    np.testing.assert_allclose(select(losses, "weighted_mean"), soft, rtol=1e-5)

    # What has diverged is believed by nobody.
    losses = np.array([[np.nan, 3.0], [2.0, np.nan]], np.float32)
    for how in ("greater", "weighted_mean"):
        assert (select(losses, how).argmax(1) == [1, 0]).all()


def test_answers_of_fewer_tokens_are_filled_with_nothing(rng):
    a, b = (top_logits(jnp.asarray(rng.standard_normal((1, 2, 9)), jnp.float32), k) for k in (3, 5))
    got = lesson(
        Answers(a, np.ones(1, np.float32)), [Answers(b, np.zeros(1, np.float32))], "greater"
    )
    assert got.ids.shape == (1, 2, 2, 5) and (got.log_probs[:, 0, :, 3:] == -np.inf).all()
    assert got.weights.tolist() == [[0.0, 1.0]]
    back = TopLogits(got.log_probs[:, 0], got.ids[:, 0], 9).dense()
    np.testing.assert_allclose(back, a.dense(), atol=1e-5)


def test_quality_is_found_in_what_was_sent(party, rng):
    rows = rows_of(TEXTS, party)
    # Mostly the right tokens, so that few of them are among what isn't sent.
    logits = rng.standard_normal((*rows.targets.shape, 320)).astype(np.float32)
    np.put_along_axis(
        logits, rows.targets[..., None], rng.normal(7, 2, (*rows.targets.shape, 1)), 2
    )
    full = jax.nn.log_softmax(jnp.asarray(logits))
    picked = np.take_along_axis(np.asarray(full), rows.targets[..., None], 2)[..., 0]
    real = np.arange(picked.shape[1]) < rows.lengths[:, None]
    wanted = np.where(real, -picked, 0).sum(1) / [len(t) for t in TEXTS]
    np.testing.assert_allclose(losses_of(top_logits(full, 320), rows), wanted, rtol=1e-4)
    few = top_logits(full, 4)
    through = TopLogits.decode(few.encode(), few.ids.shape, 320)
    np.testing.assert_allclose(losses_of(through, rows), wanted, rtol=0.1)
    # Who claims every token for certain gets no more than an even share of it.
    liar = TopLogits(np.zeros((3, 24, 8), np.float32), np.tile(np.arange(96, 104), (3, 24, 1)), 320)
    assert (losses_of(liar, rows) >= np.log(8)).all()


def test_a_client_that_says_nan_is_left_out_and_named(party, caplog):
    clients = [Party(name, SMALL, ByteTokenizer()) for name in ("one", "two")]
    options = TransferOptions(public_epochs=0, k=4)
    main, *learners = (
        language._learner(p, TEXTS, None, options, i) for i, p in enumerate((party, *clients))
    )
    learners[0].params = jax.tree.map(lambda x: x * jnp.nan, learners[0].params)
    federation = language._Federation(main, learners, options)
    assert federation._up([0, 0])["rejected"] == ["one"]
    assert "answer of one" in caplog.text and "two" not in caplog.text


def test_parameters_that_are_averaged_count_as_sent(party):
    rows, values = rows_of(TEXTS, party), (jnp.ones(3), 2 * jnp.ones(3))
    learners = [language._Learner(party, {"w": x}, None, rows) for x in values]
    assert language._average(learners) == 2 * 3 * 4
    assert all((x.params["w"] == 1.5).all() for x in learners)


@pytest.fixture(scope="module")
def runs():
    """A larger server, and two clients of five bits of which one has much text of the kind that the test is about; with and without transfer."""
    words = [
        f"{a} {b} {c}. "
        for a in ("the", "a")
        for b in ("cat", "dog", "cow")
        for c in ("sat", "ran")
    ]
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(words, 3)) for _ in range(56)]
    parties = [Party(name, SMALL, ByteTokenizer(), width=5) for name in ("one", "two")]
    server = Party("server", SMALL.replace(hidden_size=48, num_hidden_layers=2), ByteTokenizer())
    found = {}
    for direction in ("both", "none"):
        options = TransferOptions(
            rounds=2, private_epochs=10, public_epochs=30, own_share=0.1, learning_rate=5e-3, batch_size=8, k=16,
            direction=direction,
        )  # fmt: skip
        found[direction] = transfer(
            server, parties, [made[:40], made[:2]], made[40:48], made[48:], options
        )
    return found


def test_the_bytes_of_a_transfer_are_those_of_its_payloads(runs):
    last = runs["both"].rounds[-1]
    # Of two clients: a header, and at each position 16 tokens of 2 + 2 bytes.
    positions = (last["bytes_up"] / 2 - 16) / (16 * 4)
    assert positions % (8 * 8) == 0 and 8 * 33 <= positions <= 8 * 48
    assert last["bytes_down"] == last["bytes_up"]
    assert runs["none"].rounds[-1]["bytes_up"] == runs["none"].rounds[-1]["bytes_down"] == 0
    assert all(share == 1.0 for share in runs["both"].aligned)
    assert last["clients_believed"] > 0


def test_a_larger_server_and_quantised_clients_help_each_other(runs):
    # Public texts say less of what may stand in a word's place than the distributions of who has read forty others.
    for name in ("server", "one", "two"):
        key = f"bits_per_byte_{name}"
        alone = min(
            r[key] for r in runs["none"].rounds
        )  # before it knows the public texts by heart
        assert runs["both"].rounds[-1][key] < 0.95 * alone, name


def test_what_does_not_fit_is_refused(party):
    other = Party("client 1", SMALL.replace(vocab_size=330), ByteTokenizer())
    with pytest.raises(ValueError, match="client 1's vocabulary"):
        transfer(party, [other], [TEXTS], TEXTS, TEXTS, TransferOptions(align=False))
    with pytest.raises(ValueError, match="one architecture"):
        transfer(party, [party, other], [TEXTS, TEXTS], TEXTS, TEXTS, TransferOptions(average=True))
    with pytest.raises(ValueError, match="private must have"):
        transfer(party, [party], [], TEXTS, TEXTS)
    with pytest.raises(ValueError, match="num_nextn_predict_layers must be 0"):
        Party("x", jaxmoe.presets["tiny"], ByteTokenizer())
    with pytest.raises(ValueError, match="selection must be one of"):
        TransferOptions(selection="best")


@pytest.fixture
def play(tmp_path):
    """Three speakers, of whom one says next to nothing."""
    lines = [
        "First Citizen:\nSpeak, speak, good people of the town.",
        "All:\nResolved, resolved to die!",
    ]
    file = tmp_path / "play.txt"
    file.write_text("\n\n".join(lines * 120) + "\n\nBoy:\nAy.\n")
    return file


def test_the_command_line_gives_each_speaker_his_own_texts_and_nobody_the_tests(play, tmp_path):
    from jaxmoe.cli.fed_text import TextOptions, _parties, _texts

    options = TextOptions(
        f"speakers:{play}", clients=2, length=16, public=20, test=10, vocabulary=280
    )
    private, public, test, names = _texts(options, 0)
    assert names == ["First Citizen", "All"] and (len(public), len(test)) == (20, 10)
    assert "Resolved" in "".join(private[1]) and "Speak" not in "".join(private[1])
    server, clients = _parties(options, public, names, tmp_path)
    assert (
        server.tokenizer.vocab_size == 320
        and clients[1].vocabulary.tokens != clients[0].vocabulary.tokens
    )
    assert [c.width for c in clients] == [8, 5]
    with pytest.raises(ValueError, match="at most the 2"):
        _texts(TextOptions(f"speakers:{play}", clients=3, length=16, public=20, test=10), 0)
    with pytest.raises(ValueError, match="speakers:FILE or texts:FOLDER"):
        _texts(TextOptions("play.txt"), 0)


@pytest.mark.slow
def test_the_command_line_teaches_across_tokenizers(play, tmp_path):
    import json

    from jaxmoe.cli.fed_text import TextOptions, text

    options = TextOptions(
        f"speakers:{play}", clients=2, length=16, public=16, test=8, most_private=16, vocabulary=280,
        server_layers=1, server_size=32, client_layers=1, client_size=32,
    )  # fmt: skip
    text(options, TransferOptions(rounds=1, k=8), output=tmp_path, json=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row["value"] for row in report["rows"]}
    assert 0 < rows["All: aligned positions"] < 1 == rows["First Citizen: aligned positions"]
    assert set(report["ratios"]) == {
        f"{n}_with_over_without" for n in ("server", "First Citizen", "All")
    }
