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
# # A large model taught by small ones
#
# Twenty clients hold handwritten digits that they will not share, on devices too small for the server's model. Each trains a
# small model; the server averages those and lets them teach its large one on images that nobody has labelled. Then the large
# model teaches them back. That is KOALA; this notebook runs it beside federated averaging of the large model, which the
# clients could not afford.

# %%
import fed

data = fed.split(fed.data.digits(), proxy=400, validation=150, test=300, seed=0)
data.train, data.proxy

# %% [markdown]
# `data.proxy` has no labels: there is no field for them. The clients' shares are skewed: of each class, every client gets a
# share drawn from a Dirichlet distribution. Alpha values are not comparable between code bases, so look at what came out.

# %%
partition = fed.partition.dirichlet(data.train.labels, clients=20, alpha=0.5, seed=0)
statistics = partition.statistics(data.train.labels)
print(statistics)

# %%
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(6, 2.2))
axis.imshow(statistics.histogram.T, aspect="auto", cmap="viridis")
axis.set(xlabel="client", ylabel="class", title="examples")
# %% [markdown]
# ## The pair
#
# What a client saves is computed from the two models: parameters, and XLA's analysis of one training step.

# %%
from fed import architectures

small = architectures.mlp((8, 8), (16,), 10)
large = architectures.mlp((8, 8), (256, 256), 10)
options = fed.RunOptions(
    rounds=8,
    local=fed.LocalOptions(epochs=5, batch_size=16, learning_rate=0.1),
    evaluate_every=2,
)
saved = fed.savings(fed.measure(small, options.local), fed.measure(large, options.local))
small, large, {name: f"{100 * share:.1f} %" for name, share in saved.items()}

# %% [markdown]
# ## Two runs on one split

# %%
koala = fed.KoalaOptions(
    reverse=fed.Distillation(steps=100), forward=fed.Distillation(steps=50, features=0.1)
)
taught = fed.koala(large, small, data, partition, options, koala)
averaged = fed.fedavg(large, data, partition, options)
taught, averaged

# %% [markdown]
# `averaged` trained the large model at every client. `taught` never sent it anywhere; its large model has seen neither a
# client's example nor a label.

# %%
print(
    f"KOALA: large model {taught.final['large_accuracy']:.3f}, clients' {taught.final['small_accuracy']:.3f}"
)
print(f"FedAvg of the large model: {averaged.final['small_accuracy']:.3f}")
for name, run in (("KOALA", taught), ("FedAvg", averaged)):
    print(
        f"{name}: {run.total('bytes_up') / 1e6:.1f} MB up, {run.total('client_flops') / 1e9:.2f} GFLOP at clients"
    )

# %%
from fed import report

report.plot({"KOALA": [taught], "FedAvg, large": [averaged]}, "accuracy.png")

# %% [markdown]
# ## When clients lie or fail
#
# Two of the twenty send the negative of what they learned, tenfold; one in five never answers. The median of each coordinate
# withstands what breaks the mean.

# %%
import dataclasses

rough = dataclasses.replace(
    options,
    sampling=fed.Sampling(dropout=0.2, quorum=8),
    uploads=(fed.Attack((3, 11), "sign", 10.0),),
)
for aggregator in (fed.Mean(), fed.Median()):
    run = fed.fedavg(small, data, partition, dataclasses.replace(rough, aggregator=aggregator))
    print(f"{type(aggregator).__name__}: {run.final['small_accuracy']:.3f}")
