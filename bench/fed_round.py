"""How much faster is a round of vmapped clients than a loop over one jitted client step, and does its cost stay flat per client?

    python -m bench.fed_round --json bench/results/fed_round.json

Both sides train the same clients on the same batches from the same start and end in the same sum (checked). The loop dispatches one
compiled step per batch; for the CNN it runs with native convolutions as well (a model of the same sizes with a start of its own), and the
ratio to the faster of the two is reported beside those to each.
Work is what XLA counts for the one of them that needs less: our CNN multiplies by zeros too (fed.architectures.squares).
Where Flower and Ray are installed (an environment of its own, docs/federated.md), 100 of the MLP's clients also run on Flower's simulation.
Clients are spread over ``--devices`` CPU devices on the vmapped side; the loop has all cores to each step. With two devices on two cores
XLA may end the process: one device computes on all threads and the other is late to the sum.
"""

import dataclasses
import functools
import pathlib
import resource

import jax

from bench import _fed_flower
from bench._harness import finish, interleave, parser, timed

EXAMPLES, BATCH, CLASSES = 40, 20, 10


def native_cnn(side: int, channels: tuple[int, int], hidden: int):
    """The CNN of ``fed.architectures.cnn`` with XLA's own convolutions."""
    from flax import nnx

    import fed

    class Net(nnx.Module):
        def __init__(self, rngs):
            first, second = channels
            self.one = nnx.Conv(1, first, (3, 3), rngs=rngs)
            self.two = nnx.Conv(first, second, (3, 3), rngs=rngs)
            self.dense = nnx.Linear((side // 4) ** 2 * second, hidden, rngs=rngs)
            self.head = nnx.Linear(hidden, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = x[..., None]
            for conv in (self.one, self.two):
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))

    return fed.models.from_nnx(Net, (side, side), name="native convolutions")


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Clients with data, ready to be trained again and again."""

    partition: object
    data: tuple
    weights: object
    options: object

    def cohort(self, model, start, clients: int, engine):
        """One whole round: schedule on the host, training, the sum; blocks."""
        from fed import schedule

        given = schedule.buckets(
            self.partition,
            range(clients),
            seed=0,
            round_number=0,
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            most=engine.buckets,
        )
        import fed

        found = fed.train_cohort(
            model,
            start,
            self.data,
            list(given),
            jax.random.key(1),
            self.options,
            engine,
            weights=self.weights,
        )
        return jax.block_until_ready(found.mean)


@functools.cache
def setting(side: int, clients: int) -> Setting:
    """``clients`` with 40 examples each (a shared pool: nobody's data are stored twice)."""
    import jax.numpy as jnp
    import numpy as np

    import fed

    count = clients * EXAMPLES
    generator = np.random.default_rng(0)
    inputs = generator.random((count, side, side), np.float32)
    labels = generator.integers(0, CLASSES, count).astype(np.int32)
    partition = fed.partition.iid(count, clients, 0)
    return Setting(
        partition,
        (jnp.asarray(inputs), jnp.asarray(labels)),
        partition.sizes.astype(np.float32),
        fed.LocalOptions(epochs=1, batch_size=BATCH, learning_rate=0.05),
    )


def gemm_peak(rounds: int) -> float:
    """FLOP/s of one large float32 product, best of the rounds."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    run = timed(lambda: jax.block_until_ready(product(x)))
    return 2 * 2048**3 / min(interleave({"gemm": run}, rounds=rounds)["gemm"])


def speed(name: str, side: int, model, rivals: dict, given, peak: float):
    """A round against the loop: rows, ratios."""
    import fed
    from fed.costs import step_flops

    clients = given.clients
    data = setting(side, clients)
    start = model.init(jax.random.key(0))
    engine = fed.EngineOptions(chunk=given.chunk[name], devices=given.devices)
    loop = fed.EngineOptions("sequential")
    _check_equal(data, model, start, engine, loop)
    runs = {"vmapped": timed(lambda: data.cohort(model, start, clients, engine))}
    for rival, other in {"loop, same model": model, **rivals}.items():
        begun = other.init(jax.random.key(0))
        runs[rival] = timed(lambda o=other, b=begun: data.cohort(o, b, clients, loop))
    seconds = interleave(runs, rounds=given.rounds, warmup=1)
    best = {key: sorted(values)[len(values) // 2] for key, values in seconds.items()}
    step = min(step_flops(m, data.options) for m in (model, *rivals.values()))
    flops = step * clients * EXAMPLES / BATCH
    rows = [
        {
            "name": f"{name}, round of {clients} clients, {key}",
            "value": value,
            "unit": "s",
            "best": min(seconds[key]),
            "worst": max(seconds[key]),
            "rounds": given.rounds,
            "model": model.name,
            "gflop": flops / 1e9,
        }
        for key, value in best.items()
    ]
    loops = {key: value for key, value in best.items() if key != "vmapped"}
    fastest = min(loops.values())
    each = {f"{name} vmapped over {key}": v / best["vmapped"] for key, v in loops.items()}
    return rows, each | {
        f"{name} vmapped over faster loop": fastest / best["vmapped"],
        f"{name} share of GEMM peak, vmapped": flops / best["vmapped"] / peak,
        f"{name} share of GEMM peak, loop": flops / fastest / peak,
    }


def _check_equal(data: Setting, model, start, engine, loop) -> None:
    import jax.numpy as jnp

    pair = [data.cohort(model, start, 16, e) for e in (engine, loop)]
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
    if not gap < 1e-5:
        raise SystemExit(f"the two sides must agree within 1e-5; they differ by {gap}.")


def scaling(model, given):
    """Cost per client for more and more clients, and by how much the process's largest size exceeds its size before.

    Runs before the other parts: after them the largest size would be theirs. Making the data counts too, so that the growth is an upper
    bound.
    """
    import fed

    start = model.init(jax.random.key(0))
    engine = fed.EngineOptions(chunk=given.chunk["mlp"], devices=given.devices)
    data = {n: setting(8, n) for n in given.scaling}
    runs = {n: timed(lambda n=n: data[n].cohort(model, start, n, engine)) for n in given.scaling}
    rows, cost = [], {}
    before = _resident_mib()
    for n, values in interleave(runs, rounds=given.rounds, warmup=1).items():
        cost[n] = sorted(values)[len(values) // 2] / n
        rows.append(
            {
                "name": f"mlp, {n} clients, per client",
                "value": 1e6 * cost[n],
                "unit": "us",
                "best": 1e6 * min(values) / n,
                "worst": 1e6 * max(values) / n,
                "rounds": given.rounds,
            }
        )
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    grown = {"name": "process memory grown meanwhile, at most", "value": largest - before}
    rows.append(grown | {"unit": "MiB", "before": before, "largest": largest})
    stored = model.nbytes * given.scaling[-1] / 2**20
    rows.append({"name": "parameters of all clients together", "value": stored, "unit": "MiB"})
    first, last = given.scaling[0], given.scaling[-1]
    return rows, {f"cost per client, {last} over {first} clients": cost[last] / cost[first]}


def _resident_mib() -> float:
    """The process's size now; Linux only."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--parts",
        nargs="+",
        default=["mlp", "cnn", "scaling", "flower"],
        choices=["mlp", "cnn", "scaling", "flower"],
    )
    options.add_argument("--clients", type=int, default=1000)
    options.add_argument("--scaling", nargs="+", type=int, default=[100, 1000, 10000])
    options.add_argument("--flower-clients", type=int, default=100)
    options.add_argument(
        "--devices", type=int, default=1, help="CPU devices to spread clients over"
    )
    options.add_argument("--chunk-mlp", type=int, default=64, help="clients per device at once")
    options.add_argument(
        "--sides", nargs="+", type=int, default=[28, 8], help="of the CNN's images, multiples of 4"
    )
    options.add_argument("--chunk-cnn", nargs="+", type=int, default=[4, 16], help="one per side")
    given = options.parse_args()
    if len(given.chunk_cnn) != len(given.sides):
        options.error(
            f"--chunk-cnn must have as many values as --sides; got {len(given.chunk_cnn)} and {len(given.sides)}."
        )
    if any(side < 4 or side % 4 for side in given.sides):
        options.error(f"--sides must be multiples of 4; got {' '.join(map(str, given.sides))}.")
    cnns = {f"cnn {side}x{side}": side for side in given.sides}
    given.chunk = {"mlp": given.chunk_mlp, **dict(zip(cnns, given.chunk_cnn, strict=True))}
    if jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", given.devices)
    import fed

    mlp = fed.architectures.mlp((8, 8), (16,), CLASSES)
    rows, ratios = [], {}
    if "scaling" in given.parts:  # first, for its figure of memory
        found = scaling(mlp, given)
        rows, ratios = rows + found[0], ratios | found[1]
    peak = gemm_peak(given.rounds)
    rows.append({"name": "GEMM peak, one device", "value": peak / 1e9, "unit": "GFLOP/s"})
    if "mlp" in given.parts:
        found = speed("mlp", 8, mlp, {}, given, peak)
        rows, ratios = rows + found[0], ratios | found[1]
    if "cnn" in given.parts:
        for name, side in cnns.items():
            cnn = fed.architectures.cnn((side, side), (8, 16), CLASSES, hidden=32)
            rival = {"loop, native convolutions": native_cnn(side, (8, 16), 32)}
            found = speed(name, side, cnn, rival, given, peak)
            rows, ratios = rows + found[0], ratios | found[1]
    if "flower" in given.parts:
        reason = _fed_flower.missing()
        if reason is None:
            engine = fed.EngineOptions(chunk=given.chunk["mlp"], devices=given.devices)
            found = _fed_flower.compare(8, given.flower_clients, given.rounds, engine)
            rows, ratios = rows + found[0], ratios | found[1]
        else:
            print(f"no comparison with Flower: {reason}")
    finish("fed_round", rows, ratios, given.json)


if __name__ == "__main__":
    main()
