"""``jaxmoe generate``: text from a checkpoint, streamed."""

import pathlib
import sys
import time
from typing import Annotated, Literal

import jax
import numpy as np
import rich.console
import tyro

import jaxmoe
from jaxmoe.cli._models import dtype_of, in_sefp, load
from jaxmoe.config import ModelConfig
from jaxmoe.params import Params
from jaxmoe.report import make_report, write_report
from jaxmoe.tokenizer import load_tokenizer
from jaxmoe.train.config import check_seed
from quant import at_width


def stream_text(
    params: Params,
    config: ModelConfig,
    tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    write=None,
) -> tuple[str, int]:
    """Generates from one prompt, passing text to ``write`` as it appears; returns (text, tokens)."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt at least one character.")
    stop = {
        t
        for t in np.atleast_1d(
            config.eos_token_id if config.eos_token_id is not None else []
        ).tolist()
    }
    produced: list[int] = []
    shown = 0

    def on_tokens(piece: np.ndarray) -> None:
        nonlocal shown
        for token in piece[0].tolist():
            if produced and produced[-1] in stop:
                return
            produced.append(token)
        text = tokenizer.decode([t for t in produced if t not in stop])
        # An unfinished UTF-8 character decodes to the replacement sign; hold it back until it is whole.
        ready = text[:-1] if text.endswith("\ufffd") else text
        if write is not None:
            write(ready[shown:])
        shown = max(shown, len(ready))

    jaxmoe.generate(
        params,
        config,
        np.asarray([ids], np.int32),
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        eos_token_id=sorted(stop) or None,
        on_tokens=on_tokens,
    )
    text = tokenizer.decode([t for t in produced if t not in stop])
    if write is not None:
        write(text[shown:])
    return text, len(produced)


def generate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    prompt: str = "def ",
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    width: int | None = None,
    module_widths: dict[str, int] | None = None,
    json: pathlib.Path | None = None,
) -> None:
    """Continues a prompt, streaming the text to standard output.

    Args:
      checkpoint: Training run, native checkpoint, Hugging Face directory, or one with sefp.safetensors.
      prompt: Text to continue.
      max_new_tokens: How many tokens to add at most.
      temperature: 0 for greedy.
      top_p: Nucleus mass in (0, 1].
      seed: Random seed.
      dtype: Parameter dtype.
      width: SEFP bit width, 3 to 8, at which the weights are read, encoded first unless they are; default: as they are.
      module_widths: SEFP widths of parameters whose path contains a match, such as lm_head 8.
      json: Also write a JSON report.
    """
    check_seed(seed)
    widths = () if width is None else (width,)
    params, config = load(checkpoint, dtype_of(dtype), widths=widths, module_widths=module_widths)
    if width is not None or module_widths:
        params = in_sefp(params, module_widths)
    if width is not None:
        params = at_width(params, width)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}; put the model's own "
            f"tokenizer.json into {checkpoint}."
        )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write(prompt)
    start = time.perf_counter()
    text, count = stream_text(
        params,
        config,
        tokenizer,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=write,
    )
    seconds = time.perf_counter() - start
    write("\n")
    rich.console.Console(stderr=True).print(
        f"[dim]{count} tokens in {seconds:.1f} s, compilation included[/]", highlight=False
    )
    if json is not None:
        row = {"name": "tokens", "value": count, "unit": "tokens", "text": text, "seconds": seconds}
        write_report(json, make_report("generate", [row]))
