"""``jaxmoe serve``: an OpenAI-compatible server."""

import functools
import logging
import os
import pathlib
from typing import Annotated, Literal

import jax
import rich.console
import tyro

from jaxmoe.cli._models import dtype_of, load
from jaxmoe.config import ModelConfig
from jaxmoe.engine import Engine, EngineOptions
from jaxmoe.params import Params, init_params, nbytes
from jaxmoe.presets import presets
from jaxmoe.sharding import make_mesh
from jaxmoe.tokenizer import load_tokenizer
from jaxmoe.train.config import check_seed

KEY_VARIABLE = "JAXMOE_API_KEY"


def _random(
    name: str, seed: int, dtype: Literal["float32", "bfloat16"], *, mtp: bool
) -> tuple[Params, ModelConfig]:
    """Random parameters of a preset, if they fit into memory; with multi-token prediction or without."""
    if name not in presets:
        raise ValueError(
            f"--random-weights takes a preset ({', '.join(presets)}); got {name!r}. "
            "Leave it out to serve a checkpoint."
        )
    config = presets[name] if mtp else presets[name].replace(num_nextn_predict_layers=0)
    needed = nbytes(config, dtype_of(dtype), include_mtp=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory and jax.default_backend() == "cpu":
        raise ValueError(
            f"{name} needs {needed / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f}. "
            "Choose a smaller preset, such as tiny or small."
        )
    return init_params(config, jax.random.key(seed), dtype=dtype_of(dtype)), config


def _load(
    name: str, random_weights: bool, seed: int, dtype: Literal["float32", "bfloat16"], *, mtp: bool
) -> tuple[Params, ModelConfig]:
    if random_weights:
        return _random(name, seed, dtype, mtp=mtp)
    if name in presets and not pathlib.Path(name).exists():
        raise ValueError(
            f"a preset has no weights; got {name!r}. Train it with `jaxmoe train`, or add --random-weights for a trial."
        )
    return load(name, dtype_of(dtype), mtp=mtp)


def _engine(
    model: str,
    random_weights: bool,
    seed: int,
    dtype: Literal["float32", "bfloat16"],
    ranks: int,
    options: EngineOptions,
) -> Engine:
    """The engine to serve, over the first ``ranks`` devices."""
    if not 1 <= ranks <= len(jax.devices()):
        raise ValueError(f"--ranks must be in 1..{len(jax.devices())} (devices); got {ranks}.")
    params, config = _load(model, random_weights, seed, dtype, mtp=options.speculative_tokens > 0)
    tokenizer = load_tokenizer(None if random_weights else model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}; put the model's own "
            f"tokenizer.json into {model}."
        )
    mesh = None if ranks == 1 else make_mesh(expert=ranks, devices=jax.devices()[:ranks])
    return Engine(params, config, tokenizer, options, mesh=mesh)


def _announce(name: str, url: str) -> None:
    rich.console.Console(soft_wrap=True, highlight=False).print(
        f"serving {rich.markup.escape(name)} at {url}/v1, ready once {url}/readyz says so; dashboard at {url}"
    )


def serve(
    model: Annotated[str, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    ranks: int = 1,
    options: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions(),
    max_body_bytes: int = 4 << 20,
    header_timeout_s: float = 10.0,
    drain_s: float = 60.0,
    warm_up: bool = True,
) -> None:
    """Serves a model to OpenAI clients over HTTP, until SIGTERM.

    Args:
      model: Training run, native checkpoint or Hugging Face directory; a preset with --random-weights.
      host: Address to listen on; the default is reachable from this machine only.
      port: Port; 0 takes a free one.
      api_key: Key that clients must show; default: $JAXMOE_API_KEY, which other users of the machine cannot see.
      model_name: Name that clients give as "model"; default: the last part of MODEL.
      random_weights: Serve a preset with random weights, for trials.
      seed: Seed of random weights.
      dtype: Parameter dtype.
      ranks: Devices that share the requests and the experts.
      options: Sizes and limits of the engine.
      max_body_bytes: Larger request bodies are refused.
      header_timeout_s: A connection whose request's headers take longer is closed, in seconds.
      drain_s: On SIGTERM, how long running requests may take to end, in seconds.
      warm_up: Compile everything before requests are taken.
    """
    try:
        from jaxmoe.serve import dashboard, server
        from jaxmoe.serve.api import ApiOptions
    except ImportError as error:
        raise ValueError(
            f"serve needs the extra 'serve' ({error}): pip install 'jaxmoe[serve]'."
        ) from error
    check_seed(seed)
    name = model_name or pathlib.Path(model).resolve().name
    api = ApiOptions(name, api_key or os.environ.get(KEY_VARIABLE), max_body_bytes=max_body_bytes)
    where = server.ServerOptions(host, port, drain_s, warm_up, header_timeout_s)
    engine = _engine(model, random_weights, seed, dtype, ranks, options)
    # force: an imported library may have set up the root logger for itself.
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    routes = dashboard.routes(engine)
    announce = functools.partial(_announce, name)
    server.run(engine, api, where, extra_routes=routes, on_listening=announce)
