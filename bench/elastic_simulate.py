"""What recovery takes on machines that are not here, computed with the real placement and repair code.

    python -m bench.elastic_simulate --json bench/results/elastic_simulate.json

First EEP's published recoveries (arXiv 2605.10670, DeepSeek-V3 on 32 GPUs) beside the same policy in the model. Then minimal
repair with a floor of two copies on 64 to 1024 ranks: its fixed costs are those that were measured here on processes
(``--measured``, a report of ``jaxmoe recover``), its plans are made for real and timed, and weights move over the links of
``simulate.Machine``. Programs and caches of a large model take longer to bring back than the measured ones: these pauses are
lower bounds in that.
"""

import json
import pathlib
import statistics
import time

import numpy as np

from bench import _harness
from jaxmoe import elastic
from jaxmoe.elastic.simulate import Machine, draw_loads, lost_by_node, recover
from jaxmoe.presets import presets

# Lost ranks: seconds of the pause; shares in place, from peers, from hosts.
EEP = {
    1: (10.546, (0.0981, 0.8879, 0.0139)),
    2: (10.920, (0.0996, 0.8711, 0.0292)),
    4: (9.348, (0.0983, 0.8374, 0.0642)),
    8: (5.783, (0.0784, 0.7894, 0.1323)),
    16: (6.540, (0.0585, 0.5361, 0.4053)),
}
_PLANS = 10  # of which the median counts
_KINDS = ("in place", "peer", "host")
_FIXED = ("abort", "agree", "executable", "refill")  # what takes as long, whatever moves


def _row(name: str, value: float, unit: str) -> dict:
    return {"name": name, "value": value, "unit": unit}


def _published(seeds: int) -> tuple[list[dict], dict[str, float]]:
    """EEP's runs, its policy in the model, and minimal repair with EEP's fixed costs."""
    rows, worst_s, worst_share = [], 0.0, 0.0
    for count, (seconds, shares) in EEP.items():
        machine, runs = Machine(), {}
        for policy in ("eep", "minimal"):
            runs[policy] = [
                recover(machine, lost_by_node(machine, count, seed), policy, seed=seed)
                for seed in range(seeds)
            ]
        modelled = statistics.mean(run.pause_s for run in runs["eep"])
        found = [statistics.mean(run.shares[kind] for run in runs["eep"]) for kind in _KINDS]
        off = [abs(mine / theirs - 1) for mine, theirs in zip(found, shares, strict=True)]
        worst_s, worst_share = max(worst_s, abs(modelled / seconds - 1)), max(worst_share, *off)
        name = f"{count} of 32 lost"
        rows += [
            _row(f"{name}: EEP, published", seconds, "s"),
            _row(f"{name}: EEP's policy, modelled", modelled, "s"),
        ]
        for kind, theirs, mine in zip(_KINDS, shares, found, strict=True):
            rows += [
                _row(f"{name}: {kind}, published", theirs, "share"),
                _row(f"{name}: {kind}, modelled", mine, "share"),
            ]
        pause_s = statistics.mean(run.pause_s for run in runs["minimal"])
        background_s = statistics.mean(run.background_s for run in runs["minimal"])
        rows.append(_row(f"{name}: minimal repair, modelled", pause_s, "s"))
        rows.append(_row(f"{name}: minimal repair, in the background", background_s, "s"))
    return rows, {"eep_pause_worst_error": worst_s, "eep_share_worst_error": worst_share}


def _measured(path: pathlib.Path) -> tuple[float, float, float]:
    """Seconds until a loss was noticed, of the fixed costs after that, and of the whole pause, in a report of ``recover``."""
    try:
        values = {row["name"]: row["value"] for row in json.loads(path.read_text())["rows"]}
        fixed = sum(values[f"pause: {phase}"] for phase in _FIXED)
        return values["pause: detect"], fixed, values["pause"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"error: --measured must be a report of kills, as of `jaxmoe recover --json`; got {path} ({error!r})."
        ) from None


def _plan_seconds(machine: Machine, lost: list[int], seed: int) -> float:
    """Of the controller, for a plan."""
    load, _ = draw_loads(machine, seed)
    whole = elastic.Membership.initial(machine.ranks)
    placement = elastic.rebalance(load, whole, machine.slots_per_rank)
    inventory = machine.inventory(placement).without(lost, machine.slots_per_rank)
    links, fewer, seconds = machine.bandwidths(lost), whole.without(lost), []
    for _ in range(_PLANS):
        again = placement.replace_slots(placement.slot_expert)  # derived tables are remembered
        began = time.perf_counter()
        elastic.plan_repair(again, fewer, inventory, links, load=load)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _larger(detect_s: float, fixed_s: float, seed: int) -> list[dict]:
    """Minimal repair with our fixed costs."""
    rows = []
    for ranks in (64, 128, 256, 512, 1024):
        slots = max(1, 512 // ranks)
        machine = Machine(ranks=ranks, slots_per_rank=slots, detect_s=detect_s, agree_s=fixed_s)
        lone = [int(np.random.default_rng(seed).integers(ranks))]
        for count in sorted({1, 8, ranks // 8}):  # a rank, a node, an eighth
            lost = lone if count == 1 else lost_by_node(machine, count, seed)
            found = recover(machine, lost, "minimal", seed=seed)
            planned = _plan_seconds(machine, lost, seed)
            name = f"{ranks} ranks, {count} lost"
            rows += [
                _row(f"{name}: pause", found.pause_s + planned, "s"),
                _row(f"{name}: of which the plan, measured", planned, "s"),
                _row(f"{name}: moved before serving goes on", found.moved_bytes / 1e9, "GB"),
                _row(f"{name}: in the background", found.background_s, "s"),
                _row(
                    f"{name}: busiest rank when serving goes on", found.imbalance, "times the mean"
                ),
            ]
    return rows


def _tiny(detect_s: float, fixed_s: float) -> Machine:
    """The experiment's cluster: 4 ranks that hold every expert twice."""
    model = presets["tiny"]
    return Machine(
        ranks=4,
        ranks_per_node=4,
        slots_per_rank=model.n_routed_experts // 2,
        layers=sum(kind.mlp == "moe" for kind in model.layer_kinds),
        experts=model.n_routed_experts,
        expert_bytes=3 * 4 * model.hidden_size * model.moe_intermediate_size,
        detect_s=detect_s,
        agree_s=fixed_s,
    )


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    default = pathlib.Path("bench/results/recover.json")
    options.add_argument("--measured", type=pathlib.Path, default=default, help="fixed costs")
    options.add_argument("--seeds", type=int, default=3, help="of loads, for EEP's runs")
    args = options.parse_args()
    detect_s, fixed_s, pause_s = _measured(args.measured)
    rows, ratios = _published(args.seeds)
    small = _tiny(detect_s, fixed_s)
    modelled = recover(small, [1], "minimal", seed=args.seed).pause_s
    rows += [
        _row("4 processes here, 1 lost: measured", pause_s, "s"),
        _row("4 processes here, 1 lost: modelled", modelled, "s"),
    ]
    rows += _larger(detect_s, fixed_s, args.seed)
    ratios["small_run_modelled_over_measured"] = modelled / pause_s
    _harness.finish("elastic_simulate", rows, ratios, args.json)


if __name__ == "__main__":
    main()
