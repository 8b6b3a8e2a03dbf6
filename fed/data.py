"""Data sets of a federation: labelled examples, the proxy set that has no labels, and what users have as files.

Nothing is downloaded. ``digits`` comes with scikit-learn; the others read files or folders that the user names.
"""

import dataclasses
import gzip
import pathlib
import re
import struct
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fed.errors import need


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples.

    Attributes:
      inputs: [N, ...]: float32 images in [0, 1], or int32 tokens [N, T].
      labels: int32 [N], or [N, T] for language models (the next token of each).
      classes: how many different labels there are.
      name: in reports.
      owners: who an example belongs to by nature [N] (a speaker, a file), where the source says.
      owner_names: names of the owners.
    """

    inputs: np.ndarray
    labels: np.ndarray
    classes: int
    name: str = "data"
    owners: np.ndarray | None = None
    owner_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(
                f"inputs and labels must be equally many; got {len(self.inputs)} and {len(self.labels)}."
            )
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ValueError(
                f"labels must lie in [0, classes={self.classes}); got {self.labels.min()} to {self.labels.max()}."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name}: {len(self):,} x {self.inputs.shape[1:]}, {self.classes} classes)"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.inputs.shape[1:]

    def take(self, indices: np.ndarray) -> "Dataset":
        """The examples at ``indices``, in that order."""
        owners = None if self.owners is None else self.owners[indices]
        return dataclasses.replace(
            self, inputs=self.inputs[indices], labels=self.labels[indices], owners=owners
        )

    def unlabelled(self, indices: np.ndarray) -> "Unlabelled":
        """The inputs at ``indices``; their labels stay behind."""
        return Unlabelled(self.inputs[indices], self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Unlabelled:
    """A proxy set: inputs and nothing else. Whoever holds one cannot read labels, because there are none in it."""

    inputs: np.ndarray
    name: str = "proxy"

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, np.ndarray):
            raise TypeError(
                f"a proxy set must be an array of inputs; got {type(self.inputs).__name__}; of a labelled data set "
                "take dataset.unlabelled(indices)."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"Unlabelled({self.name}: {len(self):,} x {self.inputs.shape[1:]})"


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """One data set cut into parts that share no example.

    Attributes:
      train: what clients' shards are drawn from.
      proxy: the server's, without labels.
      validation: labelled, for choosing settings; never trained on.
      test: for the figures in reports only.
      indices: of each part, in the source (``test`` is absent where it came as a file of its own).
    """

    train: Dataset
    proxy: Unlabelled
    validation: Dataset
    test: Dataset
    indices: dict[str, np.ndarray]


def split(
    data: Dataset,
    *,
    proxy: float | int = 0.1,
    validation: float | int = 0.1,
    test: float | int | Dataset = 0.2,
    seed: int = 0,
) -> Splits:
    """Takes test, validation and proxy parts out of ``data``, before anything is given to clients.

    Args:
      data: the source.
      proxy: a share of ``data``, or a number of examples; the labels of this part are dropped.
      validation: the same.
      test: the same, or a data set that came apart.
      seed: of the shuffle.

    Raises:
      ValueError: if a part is empty or nothing is left for the clients.
    """
    order = np.random.default_rng([seed, 0x5917]).permutation(len(data))
    wanted: dict[str, float | int] = {"proxy": proxy, "validation": validation}
    if not isinstance(test, Dataset):
        wanted["test"] = test
    indices, start = {}, 0
    for name, size in wanted.items():
        count = int(round(size * len(data))) if isinstance(size, float) else size
        if count < 1 or start + count >= len(data):
            raise ValueError(
                f"{name} must leave examples for the clients and have one at least; got {size} of {len(data)} examples."
            )
        indices[name] = np.sort(order[start : start + count])
        start += count
    indices["train"] = np.sort(order[start:])
    check_disjoint(indices)
    return Splits(
        data.take(indices["train"]),
        data.unlabelled(indices["proxy"]),
        data.take(indices["validation"]),
        test if isinstance(test, Dataset) else data.take(indices["test"]),
        indices,
    )


def check_disjoint(indices: dict[str, np.ndarray]) -> None:
    """Raises ValueError if two parts share an example, or a part has one twice."""
    joined = np.concatenate(list(indices.values())) if indices else np.zeros(0, np.int64)
    found, counts = np.unique(joined, return_counts=True)
    if (counts > 1).any():
        example = int(found[counts > 1][0])
        where = [name for name, part in indices.items() if example in part]
        raise ValueError(
            f"parts must share no example; example {example} is in {' and '.join(where)}"
            f"{' twice' if len(where) == 1 else ''}; split before partitioning."
        )


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, float32 [N, 8, 8] in [0, 1]."""
    found = need("sklearn.datasets", "fed").load_digits()
    return Dataset(
        (found.images / 16).astype(np.float32), found.target.astype(np.int32), 10, "digits"
    )


def mnist(path: str | pathlib.Path) -> tuple[Dataset, Dataset]:
    """MNIST or Fashion-MNIST: training and test part, float32 [N, 28, 28] in [0, 1].

    Args:
      path: an ``.npz`` with train_x, train_y, test_x, test_y, or a folder with the four IDX files, gzipped or not.

    Raises:
      ValueError: for files that are missing or of another format.
      OSError: for a path that cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        read = [
            (_idx(path, f"{part}-images-idx3-ubyte"), _idx(path, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        ]
        (train_x, train_y), (test_x, test_y) = read
    else:
        with np.load(path) as file:
            names = ("train_x", "train_y", "test_x", "test_y")
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(
                    f"{path} must hold {', '.join(names)}; it lacks {', '.join(missing)}."
                )
            train_x, train_y, test_x, test_y = (file[name] for name in names)
    # Of both parts: a test part may lack a class.
    classes = 1 + int(max(labels.max(initial=0) for labels in (train_y, test_y)))
    return tuple(
        _images(x, y, path.stem, classes) for x, y in ((train_x, train_y), (test_x, test_y))
    )


def cifar10(path: str | pathlib.Path) -> tuple[Dataset, Dataset]:
    """CIFAR-10: training and test part, float32 [N, 32, 32, 3] in [0, 1].

    Args:
      path: an ``.npz`` as for :func:`mnist`, a folder with the five ``data_batch_*.bin`` and ``test_batch.bin``, or one with
        ``train/CLASS/*`` and ``test/CLASS/*`` image files.

    Raises:
      ValueError: for files that are missing or of another format, and a class of the test part that the training part lacks.
      OSError: for a path that cannot be read.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return mnist(path)
    if (path / "train").is_dir():
        names = tuple(folder.name for folder in _folders(path / "train"))
        return image_folder(path / "train"), image_folder(path / "test", names)
    parts = [sorted(path.glob("data_batch_*.bin")), sorted(path.glob("test_batch.bin"))]
    if not all(parts):
        raise ValueError(
            f"{path} must hold data_batch_*.bin and test_batch.bin, or the folders train and test; it has neither."
        )
    found = []
    for files in parts:
        raw = [np.fromfile(f, np.uint8) for f in files]
        odd = [f for f, r in zip(files, raw, strict=True) if r.size % 3073]
        if odd:
            raise ValueError(
                f"{odd[0]} must be rows of 3,073 bytes, a label and 32 x 32 x 3 pixels; got {odd[0].stat().st_size} bytes."
            )
        rows = np.concatenate([r.reshape(-1, 3073) for r in raw])
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found.append(_images(images, rows[:, 0], "cifar10", 10))
    return found[0], found[1]


def image_folder(path: str | pathlib.Path, classes: tuple[str, ...] | None = None) -> Dataset:
    """Images in one folder per class, all of one size, float32 [N, H, W] or [N, H, W, 3] in [0, 1].

    Args:
      path: of the folders.
      classes: their names in the order of labels; default: those that are there, sorted. For a part that may lack one.

    Raises:
      ValueError: for no image, images of several sizes, and a folder that is none of ``classes``.
      OSError: for a path or an image that cannot be read.
    """
    image = need("PIL.Image", "fed")
    path = pathlib.Path(path)
    folders = _folders(path)
    names = tuple(folder.name for folder in folders) if classes is None else classes
    unknown = [folder.name for folder in folders if folder.name not in names]
    if unknown:
        raise ValueError(
            f"{path} must have folders of the classes {', '.join(names)} only; it has {unknown[0]}; add it to the training part."
        )
    files = [(f, names.index(folder.name)) for folder in folders for f in sorted(folder.iterdir())]
    if not files:
        raise ValueError(f"{path} must hold one folder of images per class; it has none.")
    pixels = []
    for file, _ in files:
        with image.open(file) as opened:
            pixels.append(np.asarray(opened.convert("L" if opened.mode == "L" else "RGB")))
        if pixels[-1].shape != pixels[0].shape:
            raise ValueError(
                f"images must have one size, {pixels[0].shape}; {file} has {pixels[-1].shape}; resize it."
            )
    return _images(np.stack(pixels), np.array([i for _, i in files]), path.name, len(names))


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.iterdir() if p.is_dir())


def speakers(path: str | pathlib.Path, length: int, *, minimum: int = 2000) -> Dataset:
    """A play by speaker: blocks of ``NAME:`` and text, as in tinyshakespeare. Bytes in windows of ``length``.

    Args:
      path: the text file.
      length: tokens (bytes) per example.
      minimum: characters that a speaker must have to be a client.
    """
    text = pathlib.Path(path).read_text()
    spoken: dict[str, list[str]] = {}
    for block in re.split(r"\n\s*\n", text):
        head, _, rest = block.strip().partition("\n")
        if head.endswith(":") and rest:
            spoken.setdefault(head[:-1], []).append(rest)
    texts = {name: "\n\n".join(parts) for name, parts in spoken.items()}
    texts = {name: text for name, text in texts.items() if len(text) >= minimum}
    return from_texts(texts, length, pathlib.Path(path).stem)


def text_folder(path: str | pathlib.Path, length: int, *, pattern: str = "**/*.txt") -> Dataset:
    """Texts by file: each file that matches ``pattern`` is an owner. Bytes in windows of ``length``."""
    path = pathlib.Path(path)
    files = [f for f in sorted(path.glob(pattern)) if f.is_file()]
    texts = {
        str(f.relative_to(path)): f.read_bytes().decode("utf-8", errors="replace") for f in files
    }
    if not texts:
        raise ValueError(f"{path} must hold files that match {pattern}; it has none.")
    return from_texts(texts, length, path.name)


def from_texts(texts: dict[str, str], length: int, name: str) -> Dataset:
    """Next-byte prediction: windows of ``length`` bytes of each text; the owner is the text's name.

    A text shorter than ``length + 1`` bytes, and the rest of one after its last whole window, give no example.
    """
    inputs, labels, owners, names = [], [], [], []
    for title, text in texts.items():
        raw = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        rows = (len(raw) - 1) // length
        if rows < 1:
            continue
        inputs.append(raw[: rows * length].reshape(rows, length))
        labels.append(raw[1 : rows * length + 1].reshape(rows, length))
        owners.append(np.full(rows, len(names), np.int32))
        names.append(title)
    if not names:
        raise ValueError(
            f"length must be below the longest text's; got {length} and {len(texts)} texts, all shorter."
        )
    return Dataset(
        np.concatenate(inputs),
        np.concatenate(labels),
        256,
        name,
        np.concatenate(owners),
        tuple(names),
    )


def load(
    name: str, path: str | pathlib.Path | None = None, *, length: int = 64
) -> tuple[Dataset, Dataset | None]:
    """A data set by name: training part, and test part where the source has one.

    Args:
      name: digits, mnist, fashion_mnist, cifar10, images, speakers or texts.
      path: file or folder; every name but digits needs it.
      length: tokens per example of speakers and texts.

    Raises:
      ValueError: for another name, a missing path, and files that do not hold such data.
      OSError: for a path that cannot be read.
    """
    readers: dict[str, Any] = {
        "mnist": mnist,
        "fashion_mnist": mnist,
        "cifar10": cifar10,
        "images": lambda p: (image_folder(p), None),
        "speakers": lambda p: (speakers(p, length), None),
        "texts": lambda p: (text_folder(p, length), None),
    }
    if name == "digits":
        return digits(), None
    if name not in readers:
        raise ValueError(f"data must be digits or one of {', '.join(readers)}; got {name!r}.")
    if path is None:
        raise ValueError(f"{name} needs the path of its files; got none; nothing is downloaded.")
    return readers[name](path)


def _images(pixels: np.ndarray, labels: np.ndarray, name: str, classes: int) -> Dataset:
    """uint8 pixels and labels as a data set."""
    scaled: Float[np.ndarray, "N ..."] = pixels.astype(np.float32) / np.float32(255)
    whole: Int[np.ndarray, " N"] = labels.reshape(-1).astype(np.int32)
    return Dataset(scaled, whole, classes, name)


def _idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """An IDX file of bytes, gzipped or not."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opener(path, "rb") as file:
                raw = file.read()
            break
    else:
        raise ValueError(f"{folder} must hold {name} or {name}.gz; it has neither.")
    zero, kind, rank = struct.unpack(">HBB", raw[:4])
    if zero or kind != 8:
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes; its header is {raw[:4]!r}."
        )
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
