"""Faults of every kind done to rank processes under load: no request lost, no token repeated or wrong, everything as it was.

A few schedules here; ``make chaos`` draws two hundred.
"""

import json

import pytest
from engine import support

from jaxmoe.cli.main import main
from jaxmoe.elastic.cluster.messages import Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.experiment.draw import draw
from jaxmoe.elastic.experiment.run import run_schedule
from jaxmoe.elastic.experiment.schedule import parse_schedule
from jaxmoe.elastic.experiment.stand import Model, Stand, Workload
from jaxmoe.engine import EngineOptions

MODEL = Model("test", Weights(None), support.CONFIG.replace(num_hidden_layers=2))
ENGINE = EngineOptions(max_running=4, max_step_tokens=8, page_size=4, pages=70, max_length=96)
RANKS, SPARE = 3, 1  # with two copies of each expert on three ranks, one may be gone


@pytest.fixture(scope="module")
def stand():
    """One cluster for all schedules; each leaves it whole."""
    load = Workload.of(MODEL, ENGINE)
    with Stand(MODEL, load, ClusterOptions(ranks=RANKS), ENGINE, clients=6) as stand:
        yield stand
    assert stand.orphans == []


def _run(stand, text, **more):
    run = run_schedule(stand, parse_schedule(text, **more).checked(RANKS, SPARE), settle_s=0.2)
    assert run.problems == ()
    assert run.counts.completed > 0
    assert (run.counts.lost, run.counts.duplicated, run.counts.wrong_tokens) == (0, 0, 0)
    return run


def _types(run):
    return {pause.type for pause in run.pauses}


def test_a_rank_killed_in_a_step_and_again_on_its_way_back_beside_cancellations(stand):
    run = _run(stand, "kill:1@0.3/computed, cancel:2@lost, kill_joiner:1")
    assert {"lost", "joined"} <= _types(run)
    assert run.survivor_compiles == 0
    (pause,) = [pause for pause in run.pauses if pause.type == "lost"]
    assert pause.seconds == pytest.approx(sum(pause.phases.values()), rel=0.2)
    assert run.counts.cancelled > 0


def test_errors_stragglers_and_stale_messages_cost_no_rank(stand):
    run = _run(stand, "raise:0@0.3/step, slow:2@0.6x0.3, replay:1@0.9, stop:0@1.2x0.4")
    assert "lost" not in _types(run) and "joined" not in _types(run)


def test_too_many_ranks_gone_is_said_and_serving_goes_on_with_their_return(stand):
    run = _run(stand, "kill:0+2@0.4")
    assert run.counts.refused > 0
    assert "joined" in _types(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "stop:1@0.3",
        "cut:2@0.3/step, mute:0@0.6x3",
        "kill:0@0.3, kill:0@lost/install",
        "kill:0@0.3, kill:0@lost/step, raise:0@lost/step",  # each in the first step of a mesh
        "flip_host:1@0.3, kill:2@0.5, nan:2@joined/step",
        "kill_holders@0.5",  # whoever they are
        "drain:2@0.3, kill:0@draining+0.1",
        "kill:1@0.3, kill:1@joined",
    ],
)
def test_each_of_these_costs_nothing(stand, text):
    _run(stand, text)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_drawn_schedules_cost_nothing(stand, seed):
    assert run_schedule(stand, draw(seed, RANKS, SPARE)).problems == ()


@pytest.mark.slow
def test_the_command_reports_and_leaves_with_zero(tmp_path):
    options = ["--ranks", "3", "--faults", "kill:1@5", "--steps", "40", "--restarts", "1"]
    output, report = tmp_path / "out", tmp_path / "recover.json"
    main(["recover", *options, "--output", str(output), "--json", str(report)])
    found = json.loads(report.read_text())
    names = {"pause_s", "pause_worst_s", "reintegration_pause_s", "reintegration_pause_worst_s"}
    names |= {"steady_overhead", "restart_pause_s"}
    names |= {"lost", "duplicated", "wrong_tokens", "survivor_compiles"}
    assert names <= set(found["ratios"])
    assert found["ratios"]["problems"] == 0
    assert (output / "report.html").exists() and (output / "timeline.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--faults", "kil:1@2"], ["a fault must be one of", "'kil'"]),
        (["--faults", "kill:4@2"], ["ranks are 0..3", "kill:4@2"]),
        (["--faults", "random:x"], ["random:N", "random:x"]),
        (["--faults", "random:2", "--redundant-experts", "0"], ["raise --redundant-experts"]),
        (["--faults", "no.json"], ["no.json", "check the path"]),
        (["--model", "nothing"], ["nothing", "check the path"]),
        (["--repeat", "0"], ["--repeat must be >= 1", "0"]),
    ],
)
def test_what_makes_no_experiment_is_refused_in_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recover", *options])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
