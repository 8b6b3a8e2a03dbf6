"""Vocabularies and sequences in terms of each other: tables, warping against the plain loop, what is carried over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rapidfuzz")

from fed import vocabulary
from fed.compress import TopLogits, top_logits
from fed.vocabulary import Vocabulary, align, carry, check_same_vocabulary, vocabulary_map, warp
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer

TEXTS = ["First Citizen: speak, speak.", "Zounds, quoth Xu?", "Ünï"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE tokenizer's file, and one that writes spaces as SentencePiece does."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    place = tmp_path_factory.mktemp("tokenizers")
    text = ["First Citizen: speak, speak. You are all resolved rather to die than to famish?"] * 20
    made = {}
    for name, pre, post in (
        ("bytes", pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        ("spaces", pre_tokenizers.Metaspace(), decoders.Metaspace()),
    ):
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre, post
        alphabet = pre_tokenizers.ByteLevel.alphabet() if name == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(text, trainer)
        (place / name).mkdir()
        tokenizer.save(str(place / name / "tokenizer.json"))
        made[name] = FileTokenizer(place / name / "tokenizer.json")
    return made


def plain_warp(costs):
    """The O(T1 * T2) loop, cell by cell."""
    n, m = costs.shape
    best = np.full((n, m), np.inf)
    step = np.zeros((n, m), int)
    for i in range(n):
        for j in range(m):
            if i == j == 0:
                best[i, j] = costs[i, j]
                continue
            options = [
                best[i - 1, j - 1] if i and j else np.inf,
                best[i - 1, j] if i else np.inf,
                best[i, j - 1] if j else np.inf,
            ]
            step[i, j] = int(np.argmin(options))
            best[i, j] = costs[i, j] + options[step[i, j]]
    path = [(n - 1, m - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        path.append([(i - 1, j - 1), (i - 1, j), (i, j - 1)][step[i, j]])
    return best[-1, -1], path[::-1]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_warping_is_that_of_the_plain_loop_for_sequences_of_any_length(kind, rng):
    for t1, t2 in ((1, 1), (1, 7), (9, 1), (6, 11), (13, 5)):
        costs = rng.integers(0, 6, (4, t1, t2)).astype(kind)
        n, m = rng.integers(1, t1 + 1, 4), rng.integers(1, t2 + 1, 4)
        total, i, j = warp(costs, n, m)
        for row in range(4):
            best, path = plain_warp(costs[row, : n[row], : m[row]])
            assert total[row] == best
            size = len(path)
            assert list(zip(i[row, :size].tolist(), j[row, :size].tolist(), strict=True)) == path
            assert (i[row, size:] == -1).all() and (j[row, size:] == -1).all()


def test_lengths_outside_the_costs_are_refused():
    with pytest.raises(ValueError, match="lengths must be from 1 to 2"):
        warp(np.zeros((1, 2, 3), np.int32), np.array([0]))


def test_one_vocabulary_maps_onto_itself(trained):
    for tokenizer in (ByteTokenizer(), *trained.values()):
        own = Vocabulary.of(tokenizer, tokenizer.vocab_size + 3)
        np.testing.assert_array_equal(vocabulary_map(own, own), np.arange(len(own)))
        tokens = np.array([tokenizer.encode(TEXTS[1])])
        np.testing.assert_array_equal(align(tokens, tokens, own, own)[0], np.arange(tokens.size))


def test_equal_texts_map_to_each_other_whatever_the_tokenizer_writes_for_them(trained):
    byte, bpe, spaces = (
        Vocabulary.of(t) for t in (ByteTokenizer(), trained["bytes"], trained["spaces"])
    )
    table = vocabulary_map(byte, bpe)
    for i in range(256):
        assert bpe.tokens[table[i]] == chr(i)
    assert table[256] == dict(bpe.special)["<s>"] and table[257] == dict(bpe.special)["</s>"]
    assert table[258] == -1 and table[300] == -1  # padding and unused ids have no counterpart
    table = vocabulary_map(bpe, spaces)
    shared = [i for i, t in enumerate(bpe.tokens) if t in spaces.tokens and len(t) > 1]
    assert len(shared) > 10
    assert all(spaces.tokens[table[i]] == bpe.tokens[i] for i in shared)


def test_other_tokens_map_to_the_nearest_by_edit_distance(trained):
    bpe, byte = Vocabulary.of(trained["bytes"]), Vocabulary.of(ByteTokenizer())
    table = vocabulary_map(bpe, byte)
    for i, token in enumerate(bpe.tokens):
        if len(token) > 1 and not token.startswith("<"):
            # Each of its bytes is as near; the first is where it begins.
            assert chr(table[i]) == token[0]
    one, two = Vocabulary(("the", "xx")), Vocabulary(("e", "t", "th", "the"), (("bos", 3),))
    # A longer beginning is nearer; without one the lowest id among equals.
    assert vocabulary_map(one, two).tolist() == [2, 0]


def test_tables_are_kept_on_disk_and_read_again(trained, tmp_path):
    bpe, byte = Vocabulary.of(trained["bytes"]), Vocabulary.of(ByteTokenizer(), 333)
    made = vocabulary_map(bpe, byte, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    key = (bpe.fingerprint, byte.fingerprint)
    vocabulary._kept.pop(key)
    changed = made.copy()
    changed[5] = 7
    np.save(file, changed)
    assert vocabulary_map(bpe, byte, cache=tmp_path)[5] == 7  # the file was read
    vocabulary._kept.pop(key)
    np.save(file, made[:-1])
    with pytest.raises(ValueError, match="remove it"):
        vocabulary_map(bpe, byte, cache=tmp_path)


def test_aligned_positions_have_the_same_token_and_begin_at_the_same_byte(trained):
    byte, bpe = ByteTokenizer(), trained["bytes"]
    vb, vp = Vocabulary.of(byte), Vocabulary.of(bpe)
    for base, other, v1, v2 in ((byte, bpe, vb, vp), (bpe, byte, vp, vb)):
        for text in TEXTS[:2]:
            a, b = base.encode_all([text])[0], other.encode_all([text])[0]
            found = align(a.ids[None], b.ids[None], v1, v2)[0]
            hits = [(i, j) for i, j in enumerate(found) if j >= 0]
            assert len({j for _, j in hits}) == len(hits) > 0
            table = vocabulary_map(v2, v1)
            assert all(table[b.ids[j]] == a.ids[i] for i, j in hits)
            # A distribution is worth something where both have read the same text so far.
            starts = [(np.append(0, x.ends)[:-1]) for x in (a, b)]
            assert sum(starts[0][i] == starts[1][j] for i, j in hits) >= 0.8 * len(hits)


def test_what_is_carried_is_the_other_models_distribution_on_the_base_tokens(rng):
    # Tokens 1 and 2 of the other vocabulary become one; token 3 has no counterpart.
    table = np.array([4, 0, 0, -1, 2], np.int32)
    other = jnp.asarray(rng.standard_normal((1, 2, 5)), jnp.float32)
    probs = jax.nn.softmax(other, -1)
    got = carry(top_logits(other, 5), np.array([[1, -1, 0]]), table, np.array([[0, 3, 1]]), 6)
    dense = np.exp(got.dense())
    for i, j in ((0, 1), (2, 0)):
        p = np.asarray(probs[0, j])
        np.testing.assert_allclose(dense[0, i, [4, 0, 2]], [p[0], p[1] + p[2], p[4]], rtol=1e-4)
        # What had no counterpart is spread over the tokens that nothing was said of.
        np.testing.assert_allclose(dense[0, i, [1, 3, 5]], p[3] / 3, rtol=1e-3)
    np.testing.assert_allclose(dense[0, 1], np.eye(6)[3], atol=1e-6)


def test_many_texts_are_aligned_and_carried_in_blocks(trained, rng, monkeypatch):
    byte, bpe = ByteTokenizer(), trained["bytes"]
    v1, v2 = Vocabulary.of(byte), Vocabulary.of(bpe)
    rows = [[t.encode(text) for text in TEXTS] for t in (byte, bpe)]
    lengths = [np.array([len(ids) for ids in x]) for x in rows]
    base, other = (
        np.array([ids + [0] * (n.max() - len(ids)) for ids in x])
        for x, n in zip(rows, lengths, strict=True)
    )
    top = top_logits(jnp.asarray(rng.standard_normal((*other.shape, len(v2))), jnp.float32), 3)

    def both():
        positions = align(base, other, v1, v2, *lengths)
        return positions, carry(top, positions, vocabulary_map(v2, v1), base, len(v1))

    positions, carried = both()
    assert (positions >= 0).any()
    warped = []
    # Two texts of carry, one of align.
    monkeypatch.setattr(vocabulary, "_CHUNK", 2 * base.shape[1] * 3**2)
    monkeypatch.setattr(vocabulary, "warp", lambda c, *n: warped.append(len(c)) or warp(c, *n))
    again, in_blocks = both()
    assert warped == [1, 1, 1]
    np.testing.assert_array_equal(again, positions)
    np.testing.assert_array_equal(in_blocks.ids, carried.ids)
    np.testing.assert_allclose(in_blocks.log_probs, carried.log_probs, rtol=1e-6)


def test_the_identity_table_carries_everything_unchanged(rng):
    top = top_logits(jnp.asarray(rng.standard_normal((2, 4, 9)), jnp.float32), 4)
    own = np.arange(9, dtype=np.int32)
    got = carry(top, np.tile(np.arange(4), (2, 1)), own, np.zeros((2, 4), np.int32), 9)
    assert isinstance(got, TopLogits)
    np.testing.assert_array_equal(got.ids, top.ids)
    np.testing.assert_allclose(got.log_probs, top.log_probs, atol=1e-5)


def test_different_vocabularies_without_alignment_are_one_line(trained):
    byte, bpe = Vocabulary.of(ByteTokenizer()), Vocabulary.of(trained["bytes"])
    check_same_vocabulary(byte, Vocabulary.of(ByteTokenizer()))
    with pytest.raises(
        ValueError, match=r"client 3's vocabulary \(309 tokens\) must be the server's"
    ) as error:
        check_same_vocabulary(byte, bpe, "client 3")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least the tokenizer's 320"):
        Vocabulary.of(ByteTokenizer(), 300)
