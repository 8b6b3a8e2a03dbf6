"""``jaxmoe serve``: an OpenAI-compatible server."""

import dataclasses
import functools
import logging
import os
import pathlib
import signal
import sys
from typing import Annotated, Literal

import jax
import rich.console
import tyro

from jaxmoe import checkpoint
from jaxmoe.cli._models import dtype_of, in_sefp, load, locate
from jaxmoe.config import ModelConfig
from jaxmoe.elastic import Cluster, ClusterOptions, Weights
from jaxmoe.elastic.cluster.programs import users_folder
from jaxmoe.engine import Engine, EngineOptions
from jaxmoe.params import init_params, nbytes
from jaxmoe.presets import presets
from jaxmoe.serve.options import ApiOptions, ServerOptions
from jaxmoe.tokenizer import load_tokenizer
from jaxmoe.train.config import check_seed

KEY_VARIABLE = "JAXMOE_API_KEY"
_ONE_DEVICE = ClusterOptions(ranks=1)


def _weights(model: str, random_weights: bool, seed: int, dtype: str) -> Weights:
    """Where the parameters come from."""
    check_seed(seed)
    if random_weights:
        if model not in presets:
            raise ValueError(
                f"--random-weights takes a preset ({', '.join(presets)}); got {model!r}. "
                "Leave it out to serve a checkpoint."
            )
        return Weights(None, seed, dtype)
    if model in presets and not pathlib.Path(model).exists():
        raise ValueError(
            f"a preset has no weights; got {model!r}. Train it with `jaxmoe train`, or add --random-weights for a trial."
        )
    return Weights(str(locate(model)), seed, dtype)


def _config(model: str, weights: Weights, processes: int) -> ModelConfig:
    """The model's config. Random parameters must fit into memory: nobody has chosen a machine for them."""
    if weights.path is not None:
        return checkpoint.load_config(weights.path)
    needed = nbytes(presets[model], dtype_of(weights.dtype), include_mtp=True) * processes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory and jax.default_backend() == "cpu":
        raise ValueError(
            f"{model} needs {needed / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f}. "
            "Choose a smaller preset, such as tiny or small."
        )
    return presets[model]


def _engine(
    model: str,
    weights: Weights,
    options: EngineOptions,
    ranks: ClusterOptions,
    module_widths: dict[str, int] | None = None,
) -> Engine:
    """The engine to serve: on one device of this process, or over ranks with processes of their own."""
    if ranks.ranks == 1 and ranks != _ONE_DEVICE:
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(ranks)
            if getattr(ranks, field.name) != getattr(_ONE_DEVICE, field.name)
        ]
        raise ValueError(f"--ranks must be at least 2 with {', '.join(given)}; got 1. Add --ranks.")
    by_width = (options.widths, options.width, options.draft_width, module_widths)
    wants_sefp = any(value is not None for value in by_width)
    if ranks.ranks > 1 and (wants_sefp or (weights.path and checkpoint.holds_sefp(weights.path))):
        raise ValueError(
            f"--ranks must be 1 with weights in SEFP, which ranks do not share out yet; got {ranks.ranks}. Leave --ranks out."
        )
    mtp = options.speculative_tokens > 0 and options.draft_width is None
    config = _config(model, weights, ranks.ranks + ranks.spares)
    config = config if mtp else config.replace(num_nextn_predict_layers=0)
    tokenizer = load_tokenizer(None if weights.path is None else model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}; put the model's own "
            f"tokenizer.json into {model}."
        )
    if ranks.ranks > 1:
        ranks = dataclasses.replace(ranks, programs=ranks.programs or str(users_folder()))
        return Engine(None, config, tokenizer, options, cluster=Cluster(weights, config, ranks))
    if weights.path is None:
        params = init_params(config, jax.random.key(weights.seed), dtype=dtype_of(weights.dtype))
    else:
        params, config = load(
            weights.path,
            dtype_of(weights.dtype),
            mtp=mtp,
            widths=options.widths or (),
            module_widths=module_widths,
        )
    params = in_sefp(params, module_widths) if wants_sefp else params
    return Engine(params, config, tokenizer, options)


def _announce(name: str, url: str) -> None:
    rich.console.Console(soft_wrap=True, highlight=False).print(
        f"serving {rich.markup.escape(name)} at {url}/v1, ready once {url}/readyz says so; dashboard at {url}"
    )


def serve(
    model: Annotated[str, tyro.conf.Positional],
    api_key: str | None = None,
    model_name: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_body_bytes: int = ApiOptions.max_body_bytes,
    module_widths: dict[str, int] | None = None,
    where: Annotated[ServerOptions, tyro.conf.arg(name="")] = ServerOptions(),
    options: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions(),
    ranks: Annotated[ClusterOptions, tyro.conf.arg(name="")] = _ONE_DEVICE,
) -> None:
    """Serves a model to OpenAI clients over HTTP, until SIGTERM.

    Args:
      model: Training run, native checkpoint, Hugging Face directory, or one with sefp.safetensors; a preset with --random-weights.
      api_key: Key that clients must show; default: $JAXMOE_API_KEY, which other users of the machine cannot see.
      model_name: Name that clients give as "model"; default: the last part of MODEL.
      random_weights: Serve a preset with random weights, for trials.
      seed: Seed of random weights.
      dtype: Parameter dtype.
      max_body_bytes: Larger request bodies are refused.
      module_widths: SEFP widths of parameters whose path contains a match, such as lm_head 8, for all requests. With this or another
        option about widths, weights that are not in SEFP are encoded when the server starts.
      where: Where to listen, and how to start and end.
      options: Sizes and limits of the engine.
      ranks: Processes that share the requests and the experts; 1 for one device of this process.
    """
    try:
        from jaxmoe.serve import dashboard, server
    except ImportError as error:
        raise ValueError(
            f"serve needs the extra 'serve' ({error}): pip install 'jaxmoe[serve]'."
        ) from error
    # force: an imported library may have set up the root logger for itself.
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    name = model_name or pathlib.Path(model).resolve().name
    api = ApiOptions(name, api_key or os.environ.get(KEY_VARIABLE), max_body_bytes=max_body_bytes)
    weights = _weights(model, random_weights, seed, dtype)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while it starts: ranks end with it
    engine = _engine(model, weights, options, ranks, module_widths)
    routes = dashboard.routes(engine)
    server.run(
        engine, api, where, extra_routes=routes, on_listening=functools.partial(_announce, name)
    )
