"""From dense to sparse attention in two stages (spec 4.1): does the sparse model lose anything, and do the indexers find what matters?

    python -m bench.dsa_stages --task recall --output runs/dsa_recall --json bench/results/dsa_stages_recall.json
    python -m bench.dsa_stages --task stdlib --context 4096 --output runs/dsa_stdlib --json bench/results/dsa_stages_stdlib.json

A dense model is pre-trained; then it goes on dense, and from the same parameters through the warm-up of its indexers into sparse
training with topk an eighth of the context, with the same steps, rates and data as the dense one (the warm-up moves no parameter of the
model). Held-out nats per token of both, and the indexers' recall. Tasks: "recall", pairs of key and value of which each document has its
own, asked for again anywhere later; "stdlib", the sources of Python's standard library. A run that is there already is gone on with.
"""

import json
import pathlib
from typing import Any

import numpy as np

from bench import _harness
from jaxmoe.config import ModelConfig
from jaxmoe.presets import presets
from jaxmoe.train import TrainConfig, train
from jaxmoe.train.plot import plot_run, read_metrics

KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
VALUES = "0123456789+-*/=<>()"


def recall_document(generator: np.random.Generator, length: int) -> str:
    """Pairs like "Q7": first every key with a value drawn for this document, then keys again with that value, or a dot and a space."""
    value = dict(zip(KEYS, generator.choice(list(VALUES), len(KEYS)), strict=True))
    table = [key + value[key] for key in generator.permutation(list(KEYS))]
    asked = generator.choice(list(KEYS), length // 2)
    filler = generator.random(length // 2) < 0.5
    rest = [". " if empty else key + value[key] for key, empty in zip(asked, filler, strict=True)]
    return "".join([*table, *rest])[:length]


def write_recall(path: pathlib.Path, documents: int, length: int, seed: int) -> pathlib.Path:
    """A JSONL corpus of such documents, each as long as a row."""
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": recall_document(generator, length)}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def small_model(context: int, topk: int) -> ModelConfig:
    """Two dense layers with an indexer each: what finds a pair again takes two."""
    return presets["tiny"].replace(
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_nextn_predict_layers=0,
        num_attention_heads=2,
        hidden_size=96,
        intermediate_size=192,
        index_topk=topk,
        max_position_embeddings=max(context, 4096),
        initializer_range=0.08,
    )


def last(directory: pathlib.Path) -> dict[str, Any]:
    """A run's last line of metrics."""
    return read_metrics(directory / "metrics.jsonl")[-1]


def rows_of(name: str, record: dict[str, Any], **shape: Any) -> list[dict[str, Any]]:
    """Report rows of an evaluation."""
    rows = [
        {"name": f"{name}, held out", "value": record["held_out_loss"], "unit": "nats", **shape}
    ]
    if "index_recall" in record:
        layers = record["index_recall_layers"]
        value = record["index_recall"]
        rows.append(
            {"name": f"{name}, recall", "value": value, "unit": "share", "layers": layers, **shape}
        )
    return rows


def main() -> None:
    """Runs the experiment."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--task", choices=["recall", "stdlib"], default="recall")
    options.add_argument("--context", type=int, default=1024)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--steps", type=int, nargs=3, default=[300, 60, 60], metavar="N")
    options.add_argument("--rates", type=float, nargs=3, default=[4e-3, 1e-2, 1e-3], metavar="RATE")
    options.add_argument("--eval-bytes", type=int, default=65536)
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/dsa_stages"))
    options.add_argument(
        "--plot", type=pathlib.Path, help="also write the picture of the stages here"
    )
    args = options.parse_args()
    topk = args.context // 8
    config, data = small_model(args.context, topk), None
    if args.task == "recall":
        # Each is a row: its bytes and the end-of-document token.
        documents = args.batch * max(args.steps) + args.eval_bytes // args.context * 20
        target = args.output / "corpus.jsonl"
        data = write_recall(target, documents, args.context - 1, args.seed)

    def run(name: str, stage: str, i: int, before: pathlib.Path | None, index_weight: float):
        every = max(1, args.steps[i] // 6)
        c = TrainConfig(
            stage=stage,
            steps=args.steps[i],
            batch_size=args.batch,
            seq_len=args.context,
            learning_rate=args.rates[i],
            warmup_steps=20,
            index_weight=index_weight,
            eval_every=every,
            eval_bytes=args.eval_bytes,
            probe_bytes=args.eval_bytes // 4,
            save_every=10**6,
            seed=args.seed,
        )
        directory = args.output / name
        train(config, c, directory, data=data, init_from=before)
        print(
            f"{name}: {last(directory)['held_out_loss']:.4f} nats, recall {last(directory).get('index_recall')}",
            flush=True,
        )
        return directory

    dense = run("pretrain", "pretrain", 0, None, 0.0)
    longer = run("dense", "pretrain", 2, dense, 0.0)
    warm = run("warmup", "dsa_warmup", 1, dense, 1.0)
    sparse = run("sparse", "dsa_sparse", 2, warm, 1.0)
    shape = {"task": args.task, "context": args.context, "topk": topk}
    rows: list[dict[str, Any]] = []
    for name, directory in (("dense", longer), ("after warm-up", warm), ("sparse", sparse)):
        rows += rows_of(name, last(directory), **shape)
    difference = last(sparse)["held_out_loss"] - last(longer)["held_out_loss"]
    rows.append({"name": "sparse minus dense", "value": difference, "unit": "nats", **shape})
    plot_run(sparse, args.plot)
    _harness.finish("dsa_stages", rows, {}, args.json)


if __name__ == "__main__":
    main()
