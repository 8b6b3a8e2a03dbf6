"""``jaxmoe fed text``: language models of a server and of clients teach each other over public texts."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import rich.console
import rich.progress
import tyro

import fed
import jaxmoe
from fed.data import Dataset
from fed.language import LanguageHistory, TransferOptions, transfer
from fed.language_model import Party
from jaxmoe.report import make_report, write_report
from jaxmoe.tokenizer import ByteTokenizer, FileTokenizer


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Texts and models.

    Attributes:
      data: speakers:FILE (a play, a client per speaker) or texts:FOLDER (a client per file).
      clients: those with most text.
      length: bytes of a text; longer ones are cut into such pieces.
      public: pieces that all parties have.
      test: pieces that nobody trains on.
      most_private: pieces of a client at most; None: all.
      server_layers: of the server's model.
      server_size: hidden size of it.
      client_layers: of the clients' models.
      client_size: hidden size of them.
      widths: SEFP widths of the clients' devices, in turn; 0: full precision.
      tokenizers: of the clients, in turn: bytes, bpe (made from the public texts) or a tokenizer.json.
      vocabulary: tokens of bpe.
    """

    data: str
    clients: int = 4
    length: int = 64
    public: int = 512
    test: int = 512
    most_private: int | None = 512
    server_layers: int = 4
    server_size: int = 128
    client_layers: int = 2
    client_size: int = 64
    widths: tuple[int, ...] = (8, 5)
    tokenizers: tuple[str, ...] = ("bytes", "bpe")
    vocabulary: int = 512


def _pieces(inputs: np.ndarray) -> list[str]:
    return [bytes(row.tolist()).decode(errors="replace") for row in inputs]


def _texts(o: TextOptions, seed: int) -> tuple[list[list[str]], list[str], list[str], list[str]]:
    """(private texts of each client, public, test, names)."""
    name, _, path = o.data.partition(":")
    if name not in ("speakers", "texts"):
        raise ValueError(f"data must be speakers:FILE or texts:FOLDER; got {o.data!r}.")
    found, _ = fed.data.load(name, path or None, length=o.length)
    splits = fed.split(found, proxy=o.public, validation=1, test=o.test, seed=seed)
    train: Dataset = splits.train
    counts = np.bincount(train.owners, minlength=len(train.owner_names))
    largest = np.argsort(-counts, kind="stable")[: o.clients]
    if len(largest) < o.clients:
        raise ValueError(
            f"clients must be at most the {len(largest)} that {path} has; got {o.clients}."
        )
    private = [_pieces(train.inputs[train.owners == k][: o.most_private]) for k in largest]
    return (
        private,
        _pieces(splits.proxy.inputs),
        _pieces(splits.test.inputs),
        [train.owner_names[k] for k in largest],
    )


def _bpe(texts: Sequence[str], size: int, folder: pathlib.Path) -> FileTokenizer:
    """A byte-level BPE tokenizer of texts, kept in ``folder``."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


def _model(tokenizer: Any, layers: int, size: int) -> jaxmoe.ModelConfig:
    heads = max(1, size // 32)
    return jaxmoe.ModelConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size // heads,
        initializer_range=0.02,
    )


def _parties(
    o: TextOptions, public: list[str], names: list[str], folder: pathlib.Path
) -> tuple[Party, list[Party]]:
    kinds: dict[str, Any] = {}
    for kind in (*o.tokenizers, "bytes"):
        if kind not in kinds:
            if kind == "bpe":
                kinds[kind] = _bpe(public, o.vocabulary, folder)
            else:
                kinds[kind] = ByteTokenizer() if kind == "bytes" else FileTokenizer(kind)
    server = Party("server", _model(kinds["bytes"], o.server_layers, o.server_size), kinds["bytes"])
    clients = []
    for i, name in enumerate(names):
        tokenizer = kinds[o.tokenizers[i % len(o.tokenizers)]]
        width = o.widths[i % len(o.widths)] or None
        config = _model(tokenizer, o.client_layers, o.client_size)
        clients.append(Party(name, config, tokenizer, width))
    return server, clients


def text(
    texts: Annotated[TextOptions, tyro.conf.arg(name="")],
    options: Annotated[TransferOptions, tyro.conf.arg(name="")] = TransferOptions(),
    against: Literal["none", "nothing"] = "none",
    output: pathlib.Path = pathlib.Path("runs/fed_text"),
    json: pathlib.Path | None = None,
) -> None:
    """Language models on a server and at clients teach each other over public texts, also across tokenizers.

    Reports bits per byte on texts that nobody trained on, with the transfer and without it (the same training, each party for itself).

    Args:
      texts: Texts and models.
      options: Of the transfer.
      against: none: also run without any transfer; nothing: don't.
      output: Directory of the tokenizer and of vocabulary tables.
      json: Also write a JSON report.

    Raises:
      ValueError: for data of another form, with fewer clients than asked for, or without texts for a part.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False, markup=False)
    private, public, test, names = _texts(texts, options.seed)
    server, clients = _parties(texts, public, names, output / "bpe")
    options = dataclasses.replace(options, cache=options.cache or str(output / "tables"))
    for client, own in zip(clients, private, strict=True):
        console.print(f"{client.name}: {len(own)} texts, {client.vocabulary}, width {client.width}")
    directions = [options.direction]
    if against == "none" and options.direction != "none":
        directions.append("none")
    found: dict[str, LanguageHistory] = {}
    for direction in directions:
        with rich.progress.Progress(console=console) as bar:
            task = bar.add_task(f"transfer: {direction}", total=options.rounds)
            found[direction] = transfer(
                server,
                clients,
                private,
                public,
                test,
                dataclasses.replace(options, direction=direction),
                lambda record, bar=bar, task=task: bar.update(task, completed=record["round"] + 1),
            )
    rows, ratios = _summary(found, [server, *clients])
    _print(console, rows, ratios)
    if json is not None:
        report = make_report("fed_text", rows, ratios) | _given(texts, options)
        rounds = {name: history.rounds for name, history in found.items()}
        write_report(json, report | {"rounds": rounds, "clients": names})


def _print(
    console: rich.console.Console, rows: list[dict[str, Any]], ratios: dict[str, float]
) -> None:
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        console.print(f"{row['name']:{width}}  {row['value']:.4g} {row['unit']}")
    for name, value in ratios.items():
        console.print(f"{name}: {value:.4g}")


def _given(texts: TextOptions, options: TransferOptions) -> dict[str, Any]:
    """The report's options, without paths of this machine."""
    given = {"texts": dataclasses.asdict(texts), "options": dataclasses.asdict(options)}
    given["texts"]["data"] = given["texts"]["data"].partition(":")[0]
    given["options"].pop("cache")
    return {"options": given}


def _summary(
    found: dict[str, LanguageHistory], parties: list[Party]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows, and for each party the bits per byte with transfer over those without."""
    rows, ratios = [], {}
    for direction, history in found.items():
        last = history.rounds[-1]
        for party in parties:
            value = last[f"bits_per_byte_{party.name}"]
            rows.append({"name": f"{direction}: {party.name}", "value": value, "unit": "bits/byte"})
        if direction != "none":
            for name in ("bytes_up", "bytes_down"):
                value = sum(r[name] for r in history.rounds)
                rows.append({"name": f"{direction}: {name}", "value": value, "unit": "bytes"})
            for party, share, size in zip(
                parties[1:], history.aligned, history.device_bytes, strict=True
            ):
                rows.append(
                    {"name": f"{party.name}: aligned positions", "value": share, "unit": "share"}
                )
                rows.append(
                    {"name": f"{party.name}: on the device", "value": size, "unit": "bytes"}
                )
    if len(found) == 2:
        with_, without = found.values()
        for party in parties:
            key = f"bits_per_byte_{party.name}"
            ratios[f"{party.name}_with_over_without"] = (
                with_.rounds[-1][key] / without.rounds[-1][key]
            )
    return rows, ratios
