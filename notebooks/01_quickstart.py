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
# # Quickstart
#
# A DeepSeek-V3.2-shaped model in a few lines: multi-head latent attention, a lightning indexer that picks
# the keys each token attends to, and a mixture of experts. The `tiny` preset has every part of the real one
# and runs on a laptop.

# %%
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe

config = jaxmoe.presets["tiny"]
params = jaxmoe.init_params(config, jax.random.key(0))
f"{jaxmoe.param_count(config):,} parameters, {jaxmoe.active_param_count(config):,} used per token"

# %% [markdown]
# Parameters are a plain nested dict, the config is a frozen dataclass, and the forward pass is a function.
# Token ids are bytes.

# %%
text = b"To be, or not to be, that is the question"
tokens = np.frombuffer(text, np.uint8)[None].astype(np.int32)
logits = jaxmoe.forward(params, config, tokens)
logits.shape, logits.dtype

# %% [markdown]
# ## Routing
#
# Each token is sent to `num_experts_per_tok` of `n_routed_experts` experts, chosen within the best groups.
# `model.run` returns, besides the hidden states, what every layer did.

# %%
from jaxmoe import model

output = model.run(params, config, jnp.asarray(tokens))
moe_stats = output.stats[1][0]  # second segment: the three MoE layers, stacked
for byte, chosen in list(zip(text.decode(), moe_stats.expert_ids[0, 0].tolist()))[:6]:
    print(repr(byte), "-> experts", chosen)
print("tokens per expert, by layer:")
print(moe_stats.load)

# %%
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(5, 2.2))
image = axis.imshow(moe_stats.load, aspect="auto")
axis.set(xlabel="expert", ylabel="MoE layer", title="tokens per expert (untrained)")
_ = figure.colorbar(image)

# %% [markdown]
# Exactly `tokens x num_experts_per_tok` choices are made in every layer: nothing is ever dropped.

# %%
assert (np.asarray(moe_stats.load).sum(1) == tokens.size * config.num_experts_per_tok).all()

# %% [markdown]
# ## Sparse attention
#
# The indexer scores all earlier tokens and each query keeps the `index_topk` best. With a context no longer
# than `index_topk`, sparse attention is dense attention, to the bit:

# %%
dense = jaxmoe.forward(params, config, tokens, options=model.PassOptions(attention="dense"))
bool((dense == logits).all())

# %% [markdown]
# ## Generate
#
# An untrained model babbles; `jaxmoe demo` trains one. Seeds belong to requests: the same request gives the
# same text in any batch.

# %%
new = jaxmoe.generate(params, config, tokens, 16, temperature=1.0, key=jax.random.key(1))
bytes(int(t) for t in new[0] if t < 256)

# %% [markdown]
# ## Save and restore
#
# Checkpoints are atomic and verified, and restore onto any mesh or a single device.

# %%
directory = tempfile.mkdtemp()
jaxmoe.checkpoint.save(directory, params, config, step=0)
restored = jaxmoe.checkpoint.restore(directory)
assert (jaxmoe.forward(restored.params, restored.config, tokens) == logits).all()
restored

# %% [markdown]
# The same weights as a Hugging Face checkpoint, which `transformers` loads:

# %%
jaxmoe.checkpoint.save_hf(directory + "/hf", params, config)
params_hf, config_hf = jaxmoe.checkpoint.load_hf(directory + "/hf")
config_hf.model_type, float(abs(jaxmoe.forward(params_hf, config_hf, tokens) - logits).max())
