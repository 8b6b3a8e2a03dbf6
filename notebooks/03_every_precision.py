# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One model, every precision
#
# In SEFP the 64 weights of a group share an exponent, and each has a sign and up to eight bits of magnitude. A lower precision is the
# same bits with the last ones left out. So one set of arrays, and one file, holds the model at 8, 7, 6, 5, 4 and 3 bits.

# %%
import pathlib
import sysconfig
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxmoe
import quant
from jaxmoe.engine import Engine, EngineOptions, SamplingParams

config = jaxmoe.presets["tiny"].replace(
    num_hidden_layers=2, hidden_size=64, num_nextn_predict_layers=0
)
params = jaxmoe.init_params(config, jax.random.key(0))

# %% [markdown]
# Untrained weights would show nothing. A minute's training on Python's own source is enough for a loss that precision can spoil.

# %%
source = b"\n".join(
    p.read_bytes() for p in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
)
data = np.frombuffer(source, np.uint8).astype(np.int32)
optimizer = optax.adam(3e-3)


def loss_of(params, tokens):
    logits = jaxmoe.forward(params, config, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def step(params, state, tokens):
    loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


rng, state = np.random.default_rng(0), optimizer.init(params)


def batch(size):
    return np.stack([data[s : s + 65] for s in rng.integers(0, len(data) - 65, size)])


STEPS = 120
for _ in range(STEPS):
    params, state, loss = step(params, state, batch(8))
f"loss after {STEPS} steps: {loss:.2f} nats per byte"

# %% [markdown]
# ## Quantise once
#
# `quantize_params` puts a `SefpTensor` in place of every matrix; routers and norms stay as they are. `at_width` leaves bits out: the
# arrays are the same ones.

# %%
stored = quant.quantize_params(params)
narrow = quant.at_width(stored, 3)
weight, same = (tree["segments"][0][0]["attention"]["o"]["weight"] for tree in (stored, narrow))
print(weight, same, sep="\n")
assert weight.stored.base is same.stored.base

# %% [markdown]
# Bytes and loss of every width. The model was not tuned for them, which is what `jaxmoe tune` is for; here 3 bits cost.

# %%
held_out, widths = batch(32), range(8, 2, -1)
evaluate = jax.jit(loss_of)
sizes = [quant.nbytes(stored, width) for width in widths]
losses = [float(evaluate(quant.at_width(stored, width), held_out)) for width in widths]
for width, size, loss in zip(widths, sizes, losses):
    print(f"E5M{width}: {size / 1024:6.0f} KiB, {loss:.4f} nats")
exact = float(evaluate(params, held_out))

figure, axis = plt.subplots(figsize=(5, 2.6))
axis.plot([size / 1024 for size in sizes], losses, "o-")
axis.axhline(exact, color="gray", linewidth=1)
for width, size, loss in zip(widths, sizes, losses):
    axis.annotate(f"E5M{width}", (size / 1024, loss), textcoords="offset points", xytext=(4, 4))
_ = axis.set(xlabel="KiB of weights", ylabel="nats per byte", title="gray: float32")

# %%
assert abs(losses[0] - exact) < 0.02 and losses[-1] >= losses[0]
f"10% more than E5M4 has room for E5M{quant.width_for_bytes(stored, int(sizes[4] * 1.1))}"

# %% [markdown]
# A width is one executable, because it is another tree; going back and forth compiles and copies nothing. Single modules may keep a
# width of their own:

# %%
mixed = quant.at_width(quant.pin_widths(stored, {"lm_head": 8}), 3)
print(f"E5M3 with a head of 8 bits: {float(evaluate(mixed, held_out)):.4f} nats")

# %% [markdown]
# ## One file
#
# The file begins with what every width reads, so a width's bytes are one run from its start: a device maps as much as it needs.

# %%
directory = tempfile.mkdtemp()
path = jaxmoe.checkpoint.save_sefp(directory, stored, config)
loaded, _ = jaxmoe.checkpoint.load_sefp(directory, width=3)
print(
    f"{path.name}: {path.stat().st_size / 1024:.0f} KiB for all, {quant.nbytes(loaded) / 1024:.0f} KiB at E5M3"
)
jax.tree.map(np.testing.assert_array_equal, loaded, narrow)
everything, config = jaxmoe.checkpoint.load(directory)

# %% [markdown]
# ## Every request at its width
#
# The engine serves all of them from one copy. A policy chooses for requests that name none.

# %%
prompt = np.frombuffer(b"def __init__(self", np.uint8).tolist()
options = EngineOptions(max_running=2, max_step_tokens=32, max_length=128, widths=(3, 8))


def cheap_if_short(prompt, sampling):
    return 3 if len(prompt) < 8 else None


with Engine(everything, config, options=options, width_policy=cheap_if_short) as engine:
    asked = [SamplingParams(24, width=3), SamplingParams(24, width=8), SamplingParams(24)]
    results = engine.generate([prompt, prompt, prompt[:4]], asked)
for result in results:
    print(f"E5M{result.width}: {result.text!r}")
for result in results[:2]:
    alone = jaxmoe.generate(everything, config, np.array([prompt]), 24, width=result.width)
    assert alone[0, : len(result.token_ids)].tolist() == list(result.token_ids)

# %% [markdown]
# ## Drafts at three bits, the words of eight
#
# The narrow model guesses ahead and the wide one verifies: the tokens are those of E5M8 alone, in fewer steps.

# %%
drafting = EngineOptions(
    max_running=1, max_length=128, widths=(8,), draft_width=3, speculative_tokens=2
)
with Engine(everything, config, options=drafting) as engine:
    drafted = engine.generate([prompt], asked[1])[0]
    stats = engine.stats()
assert drafted.token_ids == results[1].token_ids
f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right, {stats.generated_tokens} tokens in {stats.steps} steps"
