"""Hugging Face checkpoints, both ways, streamed: safetensors with the released names (spec 1.3)."""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import params as params_lib
from jaxmoe._hf_config import read_config_json
from jaxmoe.checkpoint import _hf_names, _safetensors
from jaxmoe.checkpoint._layout import check_dtype, flat_params, summarise, unflatten
from jaxmoe.checkpoint._leaves import LeafWriter, read_into
from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointMismatch

MTP_FILE = "mtp.safetensors"
_SCALE = "_scale_inv"
_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
# Buffers that old exporters wrote and that the config determines.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
# The layer index that transformers' classes overlook; they report other extra layers as unexpected.
_MTP_LAYER_TRANSFORMERS_IGNORES = {"deepseek_v3": 61, "deepseek_v32": 61, "glm_moe_dsa": 78}

# -- loading ---------------------------------------------------------------------------------------


def load_hf(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    mtp: bool | None = None,
    shardings: Any = None,
) -> tuple[params_lib.Params, ModelConfig]:
    """Loads a Hugging Face checkpoint: ``config.json`` and safetensors, in one file or with an index.

    Tensors are read one at a time into the final (sharded) buffers: beside the parameters, host
    memory holds the pages of one tensor, and the converted values of one tensor if it is
    block-quantised. ``float8`` weights are dequantised: each block of
    ``quantization_config.weight_block_size`` times its entry of ``<name>_scale_inv`` (float32
    [ceil(out/128), ceil(in/128)]). Experts may be stored one by one or fused
    (``mlp.experts.gate_up_proj`` [E, 2F, D]). Any floating-point dtype is accepted for any tensor.

    Multi-token-prediction layers follow the main layers in the files
    (``model.layers.{num_hidden_layers + i}``), or lie in ``mtp.safetensors``. The copies of
    embedding and head in them may exist or not; they are never read.

    Args:
      directory: where ``config.json`` and the safetensors lie.
      dtype: bfloat16, float16, float32 or float64, for all parameters whose spec fixes none.
      mtp: True requires the MTP layers; False leaves them out (``num_nextn_predict_layers`` becomes
        0); None keeps them if any of their tensors is in the files.
      shardings: tree of shardings with the structure of the parameters, or a function from the
        config to one, such as ``lambda config: sharding.shardings(config, mesh)``; default: the
        default device.

    Returns:
      (params, config), with ``config.num_nextn_predict_layers`` telling what was kept.

    Raises:
      CheckpointCorrupt: a file is missing, truncated or damaged; the file is named.
      CheckpointMismatch: tensors are missing, unexpected or wrongly shaped; all are named, nothing
        is skipped silently. That includes MTP layers without an indexer in a V3.2 checkpoint: load
        those with ``mtp=False``.
      ValueError: an unsupported model type, quantisation or dtype.
    """
    directory = pathlib.Path(directory)
    dtype = check_dtype(dtype)
    raw = read_config_json(directory)
    found = _safetensors.scan(directory, extra_files=[MTP_FILE])
    config, ignored = _resolve_mtp(ModelConfig.from_hf(raw), found, mtp)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    fused = {i for i in range(layers) if _hf_names.fused_name(i) in found}
    table = _hf_names.tensors(config, fused)
    block = _block_size(raw, found)
    _check_tensors(directory, config, table, found, ignored, block)

    writers = _make_writers(config, dtype, shardings)
    for name, tensor in found.items():  # file by file, front to back
        entry = table.get(name)
        if entry is None or not entry.parts:
            continue
        values = tensor.read()
        if tensor.dtype in _FP8:
            values = _dequantise(
                values, found[name + _SCALE].read(), block, writers[entry.parts[0].leaf].dtype
            )
        for part in entry.parts:
            writers[part.leaf].write(part.index, part.to_ours(values))
        del values  # before the next tensor is mapped
    # Popped, so that a finished leaf and its buffers do not coexist where they are not shared.
    flat = {name: writers.pop(name).finish() for name in list(writers)}
    return unflatten(flat, config), config


def _mtp_layers_in(found: Iterable[str], main_layers: int) -> int:
    """How many layers from ``main_layers`` on show names that only MTP layers have."""
    indices = {
        int(match[1])
        for name in found
        if (match := re.match(r"model\.layers\.(\d+)\.(.+)", name))
        and match[2] in _hf_names.MTP_ONLY_NAMES
    }
    return max((i + 1 - main_layers for i in indices if i >= main_layers), default=0)


def _resolve_mtp(
    config: ModelConfig, found: dict[str, _safetensors.Tensor], mtp: bool | None
) -> tuple[ModelConfig, set[str]]:
    """The config with the number of MTP layers to load, and the names left out by choice."""
    main = config.num_hidden_layers
    in_files = _mtp_layers_in(found, main)
    if mtp is False:
        prefixes = tuple(_hf_names.layer_prefix(main + i) for i in range(in_files))
        return config.replace(num_nextn_predict_layers=0), {
            name for name in found if name.startswith(prefixes)
        }
    count = max(in_files, config.num_nextn_predict_layers)
    if mtp is None and not in_files:
        count = 0
    if mtp and not count:
        count = 1  # so that what is missing gets named
    return config.replace(num_nextn_predict_layers=count), set()


def _block_size(raw: dict[str, Any], found: dict[str, _safetensors.Tensor]) -> tuple[int, int]:
    quantised = [name for name, tensor in found.items() if tensor.dtype in _FP8]
    if not quantised:
        return (0, 0)
    quantisation = raw.get("quantization_config")
    size = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise ValueError(
            f"{quantised[0]} is {found[quantised[0]].dtype} but config.json's "
            f"quantization_config.weight_block_size is {size!r}; "
            "only block-quantised fp8 is supported, e.g. [128, 128]."
        )
    return size[0], size[1]


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def _check_tensors(
    directory: pathlib.Path,
    config: ModelConfig,
    table: dict[str, _hf_names.HfTensor],
    found: dict[str, _safetensors.Tensor],
    ignored: set[str],
    block: tuple[int, int],
) -> None:
    """Compares names, shapes and dtypes before anything is allocated."""
    problems = []
    used = set(ignored)
    for name, entry in table.items():
        tensor = found.get(name)
        if tensor is None:
            if entry.required:
                problems.append(f"missing {name}: expected shape {entry.shape}")
            continue
        used.add(name)
        if tensor.shape != entry.shape:
            problems.append(f"wrong shape {name}: expected {entry.shape}, found {tensor.shape}")
        elif tensor.dtype in _FP8:
            used.add(name + _SCALE)
            problems += _check_scale(name + _SCALE, found.get(name + _SCALE), entry, block)
        elif tensor.dtype not in _FLOATS:
            problems.append(
                f"wrong dtype {name}: expected floating point or block fp8, found {tensor.dtype}"
            )
    for name, tensor in found.items():
        if name not in used and not _HARMLESS.search(name):
            problems.append(
                f"unexpected {name}: found shape {tensor.shape}; the config has no such tensor"
            )
    if problems:
        missing_in_mtp = tuple(f"missing {prefix}" for prefix in _mtp_prefixes(config))
        hint = ""
        if any(problem.startswith(missing_in_mtp) for problem in problems):
            hint = "; mtp=False loads it without its incomplete multi-token-prediction layers"
        raise CheckpointMismatch(
            summarise(f"{directory} does not fit its config.json{hint}", problems)
        )


def _mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    first = config.num_hidden_layers
    return tuple(_hf_names.layer_prefix(first + i) for i in range(config.num_nextn_predict_layers))


def _check_scale(
    name: str, scale: _safetensors.Tensor | None, entry: _hf_names.HfTensor, block: tuple[int, int]
) -> list[str]:
    if len(entry.shape) < 2:
        return [f"wrong dtype {entry.name}: expected floating point, found fp8 for a vector"]
    expected = _scale_shape(entry.shape, block)
    if scale is None:
        return [f"missing {name}: expected shape {expected}, because {entry.name} is fp8"]
    if scale.shape != expected:
        return [f"wrong shape {name}: expected {expected}, found {scale.shape}"]
    if scale.dtype not in _SCALES:
        return [f"wrong dtype {name}: expected floating point, found {scale.dtype}"]
    return []


def _dequantise(
    values: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """[..., out, in] fp8 times its blocks' scales; the last block of either axis may be partial."""
    # Casting fp8 through a 256-entry table is 3x faster than ml_dtypes' element-wise cast.
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
    out = np.empty(values.shape, dtype)
    columns = values.shape[-1]
    for i, row in enumerate(range(0, values.shape[-2], block[0])):
        rows = slice(row, row + block[0])
        factors = np.repeat(scale[..., i : i + 1, :].astype(np.float32), block[1], axis=-1)[
            ..., :columns
        ]
        out[..., rows, :] = table[values[..., rows, :].view(np.uint8)] * factors
    return out


def _make_writers(config: ModelConfig, dtype: np.dtype, shardings: Any) -> dict[str, LeafWriter]:
    specs = params_lib.flatten(params_lib.spec(config))
    if callable(shardings):
        shardings = shardings(config)
    flat = dict.fromkeys(specs) if shardings is None else params_lib.flatten(shardings)
    if flat.keys() != specs.keys():
        problems = [
            f"{name}: only in {'shardings' if name in flat else 'params'}"
            for name in flat.keys() ^ specs.keys()
        ]
        raise ValueError(
            summarise(
                "shardings have another structure than the params; pass a function of the config",
                problems,
            )
        )
    return {name: LeafWriter(s.shape, s.dtype or dtype, flat[name]) for name, s in specs.items()}


# -- saving ----------------------------------------------------------------------------------------


def save_hf(
    directory: str | os.PathLike[str],
    params: params_lib.Params,
    config: ModelConfig,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
    mtp: bool | None = None,
) -> None:
    """Writes ``config.json`` and safetensors that ``transformers`` and ``load_hf`` read.

    Tensors are written one at a time, experts one by one under their released names. An older model
    in ``directory`` is replaced; the file that readers open first (the index, or the single file)
    appears last.

    Args:
      directory: created if needed.
      params: parameters of ``config``; sharded ones are read shard by shard.
      config: their architecture.
      max_shard_bytes: size at which the next file is begun; one file needs no index.
      dtype: converts all parameters whose spec fixes none; default: as they are.
      mtp: True writes multi-token-prediction layers as the released checkpoints do, as layers after
        the last, with their copies of embedding and head. ``transformers`` overlooks those at the
        released depths only (61 and 78 layers) and reports them as unexpected otherwise; so None
        (the default) does it at those depths and writes ``mtp.safetensors`` otherwise, which
        ``load_hf`` finds and ``transformers`` does not open. False leaves them out.

    Raises:
      ValueError: params do not fit config, config has no Hugging Face type, or params of other
        processes are needed.

    Example:
      >>> import jax, jaxmoe, tempfile
      >>> config = jaxmoe.presets["tiny"]
      >>> directory = tempfile.TemporaryDirectory()
      >>> save_hf(directory.name, jaxmoe.init_params(config, jax.random.key(0)), config)
      >>> params, loaded_config = load_hf(directory.name)
      >>> loaded_config == config
      True
      >>> directory.cleanup()
    """
    flat = flat_params(params, config)
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{name} lies on devices of other processes; use checkpoint.save, or gather it."
            )
    if mtp is False:
        config = config.replace(num_nextn_predict_layers=0)
    dtype = None if dtype is None else check_dtype(dtype)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive; got {max_shard_bytes}.")
    hf_config = config.to_hf()
    release_layout = (
        mtp or _MTP_LAYER_TRANSFORMERS_IGNORES.get(config.model_type) == config.num_hidden_layers
    )
    table = _hf_names.tensors(config)
    main, side = _plan_tensors(config, table, flat, dtype, release_layout)
    hf_config["torch_dtype"] = next(
        p.dtype.name for p in main if p.name == "model.embed_tokens.weight"
    )

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _safetensors.split(main, max_shard_bytes)
    files = dict(zip(_shard_names(len(shards)), shards, strict=True)) | (
        {MTP_FILE: side} if side else {}
    )
    texts = {"config.json": hf_config}
    if len(shards) > 1:
        texts[_safetensors.INDEX_FILE] = {
            "metadata": {"total_size": sum(p.nbytes for p in main)},
            "weight_map": {
                p.name: file for file, plans in files.items() if file != MTP_FILE for p in plans
            },
        }
    _write_all(directory, files, texts, lambda plan: _collect(table[plan.name], flat, plan.dtype))


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [_safetensors.SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _plan_tensors(
    config: ModelConfig,
    table: dict[str, _hf_names.HfTensor],
    flat: dict[str, Any],
    dtype: Any,
    release_layout: bool,
) -> tuple[list[_safetensors.Plan], list[_safetensors.Plan]]:
    """(tensors of the model's files, tensors of the MTP side file), in file order."""
    specs = params_lib.flatten(params_lib.spec(config))
    main: list[_safetensors.Plan] = []
    side: list[_safetensors.Plan] = []
    mtp_prefixes = _mtp_prefixes(config)
    for entry in table.values():
        is_mtp = entry.name.startswith(mtp_prefixes)
        source = _source_leaf(entry, release_layout and is_mtp)
        if source is None:
            continue
        fixed = specs[source].dtype if source in specs else None
        leaf_dtype = np.dtype(flat[source].dtype)
        chosen = leaf_dtype if dtype is None else np.dtype(fixed or dtype)
        plan = _safetensors.Plan(entry.name, chosen, entry.shape)
        (side if is_mtp and not release_layout else main).append(plan)
    return main, side


def _source_leaf(entry: _hf_names.HfTensor, with_copies: bool) -> str | None:
    """The leaf that decides a tensor's dtype; None for tensors that are not written."""
    if entry.parts:
        return entry.parts[0].leaf
    if with_copies and entry.name.endswith((_hf_names.MTP_EMBED_COPY, _hf_names.MTP_HEAD_COPY)):
        return "embed/weight"
    return "embed/weight" if 0 in entry.shape else None


def _collect(entry: _hf_names.HfTensor, flat: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    """One tensor in the file's layout, on the host."""
    out = np.empty(entry.shape, dtype)
    if not entry.parts and out.size:
        # A multi-token-prediction layer's copy of the embedding or of the head.
        if entry.name.endswith(_hf_names.MTP_EMBED_COPY) or "lm_head/weight" not in flat:
            read_into(out, flat["embed/weight"], (slice(None),) * 2)
        else:
            read_into(out.T, flat["lm_head/weight"], (slice(None),) * 2)
    for part in entry.parts:
        read_into(part.to_ours(out), flat[part.leaf], part.index)
    return out


def _write_all(
    directory: pathlib.Path,
    files: dict[str, list[_safetensors.Plan]],
    texts: dict[str, Any],
    values: Callable[[_safetensors.Plan], np.ndarray],
) -> None:
    """Writes under temporary names, removes the old model, renames; the entry point last."""
    temporary: dict[str, pathlib.Path] = {}
    try:
        for file, plans in files.items():
            temporary[file] = directory / f".{file}.tmp"
            by_name = {plan.name: plan for plan in plans}
            _safetensors.write(
                temporary[file], plans, lambda name, by_name=by_name: values(by_name[name])
            )
        for file, text in texts.items():
            temporary[file] = directory / f".{file}.tmp"
            temporary[file].write_text(json.dumps(text, indent=2) + "\n")
        for pattern in (
            _safetensors.INDEX_FILE,
            _safetensors.SINGLE_FILE,
            "model-?????-of-?????.safetensors",
            MTP_FILE,
        ):
            for old in directory.glob(pattern):
                old.unlink()
        entry_points = (_safetensors.INDEX_FILE, _safetensors.SINGLE_FILE)
        for file in sorted(
            temporary, key=lambda file: (file in entry_points, file == _safetensors.INDEX_FILE)
        ):
            os.replace(temporary[file], directory / file)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
