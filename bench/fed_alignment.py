"""How much faster tokens are aligned along anti-diagonals, all texts at once, than cell by cell.

    python -m bench.fed_alignment --data tinyshakespeare.txt --json bench/results/fed_alignment.json

Texts of ``--length`` bytes as bytes and in a byte-level BPE vocabulary that is made from them. Both sides find the same paths (asserted). "Cell by cell"
is the plain loop over T1 x T2 that FedMKT's code runs per text, with an edit distance per cell; "with a table" is that loop when the distances of
different tokens are looked up instead.
"""

import pathlib
import tempfile

import numpy as np

from bench import _harness
from fed.vocabulary import Vocabulary, align, token_costs, vocabulary_map, warp
from jaxmoe.cli.fed_text import _bpe
from jaxmoe.report import median_row
from jaxmoe.tokenizer import ByteTokenizer


def plain(costs) -> list[tuple[int, int]]:
    """The path of one pair of sequences, cell by cell. ``costs(i, j)``."""
    n, m, cost = costs
    best = [[0.0] * m for _ in range(n)]
    move = [[0] * m for _ in range(n)]
    far = float("inf")
    for i in range(n):
        for j in range(m):
            if i == j == 0:
                best[0][0] = cost(0, 0)
                continue
            options = (
                best[i - 1][j - 1] if i and j else far,
                best[i - 1][j] if i else far,
                best[i][j - 1] if j else far,
            )
            least = min(options)
            move[i][j] = options.index(least)
            best[i][j] = cost(i, j) + least
    path = [(n - 1, m - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        path.append(((i - 1, j - 1), (i - 1, j), (i, j - 1))[move[i][j]])
    return path[::-1]


def _rows(encoded: list) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(e.ids) for e in encoded])
    rows = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, e in zip(rows, encoded, strict=True):
        row[: len(e.ids)] = e.ids
    return rows, lengths


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--data", required=True, type=pathlib.Path, help="a text file")
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--length", type=int, default=256, help="bytes of a text")
    options.add_argument("--vocabulary", type=int, default=1024)
    options.set_defaults(rounds=5)
    args = options.parse_args()
    from rapidfuzz.distance import Levenshtein

    text = args.data.read_text()
    starts = np.random.default_rng(args.seed).integers(0, len(text) - args.length, args.texts)
    texts = [text[s : s + args.length] for s in starts]
    with tempfile.TemporaryDirectory() as folder:
        bpe = _bpe([text], args.vocabulary, pathlib.Path(folder))
        byte, words = Vocabulary.of(ByteTokenizer()), Vocabulary.of(bpe)
        a, n = _rows(ByteTokenizer().encode_all(texts))
        b, m = _rows(bpe.encode_all(texts))
    vocabulary_map(words, byte)  # made once per pair of vocabularies
    costs = token_costs(a, b, byte, words)

    def cells(row: int):
        first = [byte.tokens[i] for i in a[row]]
        second = [words.tokens[i] for i in b[row]]
        return n[row], m[row], lambda i, j: Levenshtein.distance(first[i], second[j])

    def looked_up(row: int):
        table = costs[row].tolist()
        return n[row], m[row], lambda i, j: table[i][j]

    _, i, j = warp(costs, n, m)
    for row in range(args.texts):
        path = plain(looked_up(row))
        found = list(zip(i[row, : len(path)].tolist(), j[row, : len(path)].tolist(), strict=True))
        if found != path or i[row].max(initial=-1) != n[row] - 1:
            raise SystemExit(f"paths of text {row} differ")
    runs = {
        "anti-diagonals": lambda: warp(costs, n, m),
        "anti-diagonals, with distances": lambda: align(a, b, byte, words, n, m),
        "cell by cell, with a table": lambda: [plain(looked_up(r)) for r in range(args.texts)],
        "cell by cell": lambda: [plain(cells(r)) for r in range(args.texts)],
    }
    measures = {name: _harness.timed(run) for name, run in runs.items()}
    seconds = _harness.interleave(measures, rounds=args.rounds, warmup=1)
    rows = [
        median_row(name, [1e3 * s / args.texts for s in values], "ms/text")
        for name, values in seconds.items()
    ]
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = {
        "warp_speedup_over_loop": middle["cell by cell, with a table"] / middle["anti-diagonals"],
        "align_speedup_over_loop": middle["cell by cell"]
        / middle["anti-diagonals, with distances"],
    }
    _harness.finish("fed_alignment", rows, ratios, args.json)


if __name__ == "__main__":
    main()
