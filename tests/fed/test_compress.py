"""Payloads: exact lengths, what arrives, what is refused; error feedback; logits as their largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from fed import compress
from fed.compress import Codec, TopLogits, top_logits

CODECS = (
    Codec("none"),
    Codec("bfloat16"),
    Codec("int8"),
    Codec("sefp", width=8),
    Codec("sefp", width=3),
    Codec("topk", fraction=0.25),
)
IDS = [f"{c.name}{c.width}" for c in CODECS]


@pytest.fixture
def tree(rng):
    """Shapes that fill no block or group, several dtypes, an empty leaf, a leaf of zeros, one of tiny values."""
    return {
        "w": jnp.asarray(rng.standard_normal((7, 45)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(3) * 1e-9, jnp.float32),
        "half": jnp.asarray(rng.standard_normal((2, 130)), jnp.bfloat16),
        "zeros": jnp.zeros((5,), jnp.float32),
        "empty": jnp.zeros((0, 4), jnp.float32),
        "step": jnp.asarray(12, jnp.int32),
    }


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
def test_the_predicted_bytes_are_those_of_the_payload_and_the_receiver_sees_the_roundtrip(
    codec, tree
):
    payload = codec.encode(tree)
    assert codec.nbytes(tree) == len(payload)
    assert codec.nbytes(jax.eval_shape(lambda: tree)) == len(payload)
    got, seen = codec.decode(payload, tree), jax.jit(codec.roundtrip)(tree)
    for name, leaf in tree.items():
        assert got[name].dtype == seen[name].dtype == leaf.dtype and got[name].shape == leaf.shape
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(seen[name]), err_msg=name)
    assert int(got["step"]) == 12


def test_each_codec_keeps_the_precision_that_its_bits_allow(tree):
    # Largest error over the leaf's largest value: half a step of each format.
    bounds = {"none8": 0, "bfloat168": 2**-8, "int88": 0.51 / 127, "sefp8": 2**-8, "sefp3": 2**-3}
    for codec, name in zip(CODECS[:5], IDS, strict=False):
        got = codec.decode(codec.encode(tree), tree)
        for leaf in ("w", "b"):
            error = float(jnp.abs(got[leaf] - tree[leaf]).max() / jnp.abs(tree[leaf]).max())
            assert error <= bounds[name], (name, leaf, error)
    assert float(jnp.abs(Codec("bfloat16").roundtrip(tree)["w"] - tree["w"]).max()) > 0


def test_sefp_payloads_have_the_bytes_of_the_stored_tensor(rng):
    w = jnp.asarray(rng.standard_normal(640), jnp.float32)
    stored = quant.SefpTensor.encode(w)
    for width in (3, 5, 8):
        # The tensor's, the header, and one float32 scale.
        assert Codec("sefp", width=width).nbytes(w) == stored.nbytes(width) + 16 + 4


def test_topk_sends_the_largest_magnitudes_and_zeros_elsewhere():
    w = jnp.array([0.1, -5.0, 0.2, 3.0, -0.3, 0.0, 0.4, 1.0])
    assert Codec("topk", fraction=0.25).roundtrip(w).tolist() == [0, -5, 0, 3, 0, 0, 0, 0]


def test_mapped_over_clients_each_one_has_its_own_scales(rng):
    w = jnp.asarray(rng.standard_normal((3, 70)) * np.array([[1e-4], [1.0], [1e4]]), jnp.float32)
    for codec in CODECS[2:4]:
        together = jax.jit(jax.vmap(codec.roundtrip))(w)
        alone = jnp.stack([codec.decode(codec.encode(row), row) for row in w])
        np.testing.assert_array_equal(together, alone)


def test_error_feedback_loses_nothing_over_rounds(rng):
    codec, total, sent = Codec("topk", fraction=0.1), jnp.zeros(50), jnp.zeros(50)
    step = jax.jit(lambda u, r: (*compress.with_feedback(codec, u, r), codec.roundtrip(u)))
    plain, residual = jnp.zeros(50), jnp.zeros(50)
    for _ in range(30):
        update = jnp.asarray(rng.standard_normal(50) + 0.5, jnp.float32)
        seen, residual, once = step(update, residual)
        total, sent, plain = total + update, sent + seen, plain + once
    np.testing.assert_allclose(sent + residual, total, atol=1e-4)  # float32 sums of 30
    assert jnp.linalg.norm(total - sent) < 0.5 * jnp.linalg.norm(total - plain)


def test_a_damaged_cut_or_foreign_payload_is_refused(tree):
    codec = Codec("int8")
    payload = codec.encode(tree)
    flipped = bytearray(payload)
    flipped[40] ^= 1
    with pytest.raises(ValueError, match="damaged or cut"):
        codec.decode(bytes(flipped), tree)
    with pytest.raises(ValueError, match="damaged or cut"):
        codec.decode(payload[:-1], tree)
    with pytest.raises(ValueError, match="not made by"):
        codec.decode(b"hello", tree)
    with pytest.raises(ValueError, match="codec int8"):
        Codec("bfloat16").decode(payload, tree)
    with pytest.raises(ValueError, match="the tree that was sent"):
        codec.decode(payload, {"w": jnp.zeros(3)})


def test_a_nan_is_refused_by_name_where_the_codec_cannot_carry_it():
    bad = {"ok": jnp.ones(3), "head": {"w": jnp.array([1.0, jnp.nan])}}
    for name in ("int8", "sefp", "topk"):
        with pytest.raises(ValueError, match="head/w has NaN"):
            Codec(name).encode(bad)
    assert jnp.isnan(Codec("bfloat16").decode(Codec("bfloat16").encode(bad), bad)["head"]["w"][1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "zip"}, "codec must be one of"),
        ({"name": "sefp", "width": 2}, "width must be"),
        ({"fraction": 0.0}, "fraction"),
    ],
)
def test_options_that_there_are_not_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Codec(**options)


def test_codecs_have_names():
    assert compress.codec_named("sefp:4") == Codec("sefp", width=4)
    assert compress.codec_named("topk:0.5") == Codec("topk", fraction=0.5)
    assert compress.codec_named("none").lossless and not compress.codec_named("int8").lossless
    for text, said in (
        ("sefp:x", "wrong number"),
        ("int8:3", "takes no number"),
        ("x", "codec must be"),
    ):
        with pytest.raises(ValueError, match=said):
            compress.codec_named(text)


def test_top_logits_arrive_with_exact_bytes_and_keep_the_tail_mass(rng):
    for vocab, id_bytes in ((200, 1), (70_000, 4)):
        logits = jnp.asarray(rng.standard_normal((2, 3, vocab)) * 3, jnp.float32)
        top = top_logits(logits, k=16)
        payload = top.encode()
        assert len(payload) == compress.logits_nbytes((2, 3, 16), vocab) == 16 + 96 * (2 + id_bytes)
        got = TopLogits.decode(payload, (2, 3, 16), vocab)
        np.testing.assert_array_equal(got.ids, top.ids)
        exact = jax.nn.log_softmax(logits)
        dense = got.dense()
        np.testing.assert_allclose(jnp.exp(dense).sum(-1), 1.0, atol=1e-5)
        kept = jnp.take_along_axis(dense, top.ids, -1)
        # bfloat16 keeps 8 bits of a log-probability.
        np.testing.assert_allclose(
            kept, jnp.take_along_axis(exact, top.ids, -1), rtol=2**-7, atol=0.02
        )


def test_all_tokens_sent_give_the_distribution_itself(rng):
    logits = jnp.asarray(rng.standard_normal((4, 10)), jnp.float32)
    np.testing.assert_allclose(
        top_logits(logits, k=99).dense(), jax.nn.log_softmax(logits), atol=1e-5
    )


def test_logits_of_another_vocabulary_or_shape_are_refused(rng):
    payload = top_logits(jnp.asarray(rng.standard_normal((2, 300)), jnp.float32), k=8).encode()
    with pytest.raises(ValueError, match="Check the public set"):
        TopLogits.decode(payload, (3, 8), 300)
    with pytest.raises(ValueError, match="another vocabulary"):
        TopLogits.decode(top_logits(jnp.arange(300.0)[None], k=8).encode(), (1, 8), 257)
    with pytest.raises(ValueError, match="at least 1"):
        top_logits(jnp.zeros(3), k=0)
