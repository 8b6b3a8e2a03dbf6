"""From dense to sparse attention in two stages (spec 4.1): does the sparse model lose anything, and do the indexers find what matters?

    python -m bench.dsa_stages --task recall --output runs/dsa_recall --json bench/results/dsa_stages_recall.json
    python -m bench.dsa_stages --task stdlib --output runs/dsa_stdlib --json bench/results/dsa_stages_stdlib.json

A dense model is pre-trained on short rows, then on rows of the whole context. From there it goes on dense, and from the same parameters
through the warm-up of its indexers into sparse training with topk an eighth of the context, with the same steps, rates and data as the
dense one (the warm-up moves no parameter of the model). Held-out nats per token of both, and the indexers' recall. Tasks: "recall", where
every answer is found among a few facts hidden in filler at the document's beginning (irreducible: ln 32 nats per byte of filler, ln 8 per
question: 2.44 on average with where the facts lie); "stdlib", the sources of Python's standard library. A run that is there already is gone on with.
"""

import pathlib
from typing import Any

import numpy as np

from bench import _harness
from jaxmoe.config import ModelConfig
from jaxmoe.presets import presets
from jaxmoe.train import TrainConfig, train
from jaxmoe.train.plot import plot_run, read_metrics

KEYS = VALUES = 8
FILLERS, TOLD = 32, 2
NAMES = ("short", "pretrain", "dense", "warmup", "sparse")


def recall_document(generator: np.random.Generator, length: int) -> bytes:
    """First filler with facts hidden in it, keys with the values that this document has drawn for them; then questions and answers.

    A fact is a byte that holds key and value; each is told twice somewhere in the first quarter. Each later byte holds the value of the
    key that the byte before asked for, and asks for another. It doesn't tell whose value it is, so every answer has to be found among
    the facts, up to ``length`` bytes ago, by content; one look does. Nothing in the filler can be foreseen.
    """
    pairs, told = KEYS * VALUES, length // 4
    value = generator.integers(0, VALUES, KEYS)
    asked = generator.integers(0, KEYS, length)
    body = pairs + value[np.roll(asked, 1)] * KEYS + asked
    body[:told] = 2 * pairs + generator.integers(0, FILLERS, told)
    places = generator.permutation(told)[: TOLD * KEYS]
    body[places] = np.tile(np.arange(KEYS) * VALUES + value, TOLD)
    return body.astype(np.uint8).tobytes()


def write_recall(path: pathlib.Path, documents: int, length: int, seed: int) -> pathlib.Path:
    """A directory of such documents, each as long as a row."""
    generator = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (path / f"{i}.bin").write_bytes(recall_document(generator, length))
    return path


def small_model(task: str, context: int) -> ModelConfig:
    """Dense layers with an indexer each; topk is an eighth of the context."""
    layers = 1 if task == "recall" else 2
    return presets["tiny"].replace(
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_nextn_predict_layers=0,
        # One look needs one head; another would spread its attention, for want of anything to find, which no selection can keep.
        num_attention_heads=1 if task == "recall" else 2,
        hidden_size=96,
        intermediate_size=192,
        index_n_heads=8,
        index_topk=context // 8,
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
        at_most = record.get("index_recall_at_most")  # runs from before lack it
        more = {"layers": layers, "at_most": at_most, **shape}
        rows.append({"name": f"{name}, recall", "value": value, "unit": "share", **more})
    return rows


def _corpus(args: Any, context: int, rows: int) -> pathlib.Path | None:
    """Where the task's documents for rows of ``context`` are; each fills one, with its end-of-document token."""
    if args.task != "recall":
        return None
    target = args.output / f"corpus_{context}"
    held_out = args.eval_bytes // context * 20  # a twentieth is held out
    return write_recall(target, rows + held_out, context - 1, args.seed)


def _runs(args: Any) -> dict[str, pathlib.Path]:
    """Runs all stages: their directories by name."""
    home: dict[str, pathlib.Path] = {}
    config = small_model(args.task, args.context)
    data = _corpus(args, args.context, args.batch * args.steps[1])
    brief = _corpus(args, args.short_context, args.short_batch * args.steps[0] // 4)

    def run(name: str, stage: str, before: str | None, index_weight: float) -> None:
        steps, short = args.steps[NAMES.index(name)], name == "short"
        c = TrainConfig(
            stage=stage,
            steps=steps,
            batch_size=args.short_batch if short else args.batch,
            seq_len=args.short_context if short else args.context,
            learning_rate=args.rates[NAMES.index(name)],
            warmup_steps=20,
            index_weight=index_weight,
            eval_every=max(1, steps // 6),
            eval_bytes=args.eval_bytes,
            probe_bytes=args.eval_bytes // 4,
            save_every=max(1, steps // 2),
            seed=args.seed,
        )
        home[name] = args.output / name
        start = None if before is None else home[before]
        train(config, c, home[name], data=brief if short else data, init_from=start)
        record = last(home[name])
        found = f"{record['held_out_loss']:.4f} nats, recall {record.get('index_recall')}"
        print(f"{name}: {found}", flush=True)

    run("short", "pretrain", None, 0.0)
    run("pretrain", "pretrain", "short", 0.0)
    run("dense", "pretrain", "pretrain", 0.0)
    run("warmup", "dsa_warmup", "pretrain", 1.0)
    run("sparse", "dsa_sparse", "warmup", 1.0)
    return home


def main() -> None:
    """Runs the experiment."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--task", choices=["recall", "stdlib"], default="recall")
    options.add_argument("--context", type=int, default=4096)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--short-context", type=int, default=256)
    options.add_argument("--short-batch", type=int, default=16)
    stages = {"nargs": 5, "metavar": tuple(name.upper() for name in NAMES)}
    # The dense and the sparse run have the same number of steps and the same rate.
    options.add_argument("--steps", type=int, default=[900, 120, 150, 60, 150], **stages)
    options.add_argument("--rates", type=float, default=[4e-3, 3e-3, 1e-3, 1e-2, 1e-3], **stages)
    options.add_argument("--eval-bytes", type=int, default=65536)
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/dsa_stages"))
    options.add_argument(
        "--plot", type=pathlib.Path, help="also write the picture of the stages here"
    )
    args = options.parse_args()
    if args.steps[2] != args.steps[4] or args.rates[2] != args.rates[4]:
        raise SystemExit("--steps and --rates must be the same for DENSE and SPARSE.")
    home = _runs(args)
    shape = {"task": args.task, "context": args.context, "topk": args.context // 8}
    rows: list[dict[str, Any]] = []
    for name in NAMES[2:]:
        rows += rows_of(name, last(home[name]), **shape)
    difference = last(home["sparse"])["held_out_loss"] - last(home["dense"])["held_out_loss"]
    rows.append({"name": "sparse minus dense", "value": difference, "unit": "nats", **shape})
    plot_run(home["sparse"], args.plot)
    _harness.finish("dsa_stages", rows, {}, args.json)


if __name__ == "__main__":
    main()
