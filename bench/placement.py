"""How long the controller thinks: placing all experts, repairing after losses, filling a rank that returns.

    python -m bench.placement --json bench/results/placement.json

DeepSeek-V3 shapes (256 experts in each of 61 layers, 64 redundant) with log-normal loads. Planning only: nothing is moved. "plain
EPLB" is the published algorithm alone, without floor and without keeping copies apart.
"""

import numpy as np

from bench import _harness
from jaxmoe import elastic
from jaxmoe.report import median_row

LAYERS, EXPERTS, EXPERT_BYTES = 61, 256, 3 * 7168 * 2048


def _measures(load: np.ndarray, ranks: int, slots: int, seed: int) -> dict:
    """What is timed for one cluster. A sixteenth of the ranks is lost."""
    whole = elastic.Membership.initial(ranks)
    placement = elastic.rebalance(load, whole, slots)
    lost = np.random.default_rng(seed).choice(ranks, ranks // 16, replace=False).tolist()
    fewer = whole.without(lost)
    backup = elastic.host_backup(ranks, LAYERS, EXPERTS, copies=2)
    inventory = elastic.Inventory.of(placement, EXPERT_BYTES, host=backup, checkpoint=True)
    inventory = inventory.without(lost, slots)
    bandwidths = elastic.Bandwidths.uniform(ranks)

    def again() -> elastic.Placement:
        # A new object: tables derived from a placement are remembered by it.
        return placement.replace_slots(placement.slot_expert)

    def repair() -> elastic.Plan:
        return elastic.plan_repair(again(), fewer, inventory, bandwidths, load=load)

    repaired = repair()
    later = inventory.after(repaired)
    anew = elastic.rebalance(load, fewer, slots, near=repaired.placement)
    name = f"{ranks} ranks x {slots}"
    return {
        f"{name}: rebalance": lambda: elastic.rebalance(load, whole, slots),
        f"{name}: plain EPLB": lambda: elastic.eplb(load, ranks * slots, ranks=ranks),
        f"{name}: rebalance near the old": lambda: elastic.rebalance(
            load, fewer, slots, near=repaired.placement
        ),
        f"{name}: repair, {len(lost)} lost, {len(repaired.moves)} moves": repair,
        f"{name}: join": lambda: elastic.plan_join(
            repaired.placement, fewer, lost[0], later, bandwidths, load=load
        ),
        f"{name}: chunks of 256": lambda: list(elastic.chunks(repaired.placement, anew, 256)),
    }


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of loads")
    args = options.parse_args()
    load = np.random.default_rng(args.seed).lognormal(0, args.sigma, (LAYERS, EXPERTS))
    runs = _measures(load, 320, 1, args.seed) | _measures(load, 32, 10, args.seed)
    measures = {name: _harness.timed(run) for name, run in runs.items()}
    timings = _harness.interleave(measures, rounds=args.rounds)
    rows = [
        median_row(name, [1e3 * second for second in seconds], "ms")
        for name, seconds in timings.items()
    ]
    _harness.finish("placement", rows, {}, args.json)


if __name__ == "__main__":
    main()
