"""The recovery experiment's own arithmetic and words; ``test_faults`` runs it on processes."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from jaxmoe.elastic.cluster.status import Event
from jaxmoe.elastic.experiment import checks, metrics
from jaxmoe.elastic.experiment import report as pages
from jaxmoe.elastic.experiment.baselines import Restart
from jaxmoe.elastic.experiment.draw import draw
from jaxmoe.elastic.experiment.experiment import Findings, rates_after_loss, summarise
from jaxmoe.elastic.experiment.load import Record
from jaxmoe.elastic.experiment.run import Run
from jaxmoe.elastic.experiment.schedule import (
    COVERS,
    Injection,
    Schedule,
    parse_injection,
    parse_schedule,
    read_schedules,
)
from jaxmoe.report import make_report

EXPECTED = [(5, 6, 7, 8, 9)]


# -- schedules ---------------------------------------------------------------------------------------


def test_schedules_are_read_as_they_are_written():
    text = "kill:0+2@2, kill:1@lost+0.25/step, stop:3@4x0.5, kill_joiner:1@returning, kill_holders@5, cancel:3@6"
    schedule = parse_schedule(text, seed=4)
    assert str(schedule) == text
    assert schedule.injections[0] == Injection("kill", (0, 2), at_s=2.0)
    assert schedule.injections[1] == Injection("kill", (1,), after="lost", at_s=0.25, point="step")
    assert schedule.injections[5] == Injection("cancel", number=3, at_s=6.0)
    assert parse_injection("kill_joiner:1") == schedule.injections[3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kil:1@2", "a fault must be one of kill, .*; got 'kil'"),
        ("kill 1", "written KIND:RANK@WHEN.*got 'kill 1'"),
        ("kill@2", "kill needs a rank, such as kill:1; got kill@2"),
        ("kill_holders:1@2", "kill_holders is about no rank"),
        ("kill:1+1@2", "every rank once; got kill:1"),
        ("kill:1@2/never", "a point is one of now, step, .*got 'never'"),
        ("drain:1@2/step", "a point is one of .* for kill, .*; got 'step'"),
        ("kill:1@never", "after @ comes a number of seconds or one of lost, .*got 'never'"),
        ("slow:1@2", "slow needs seconds, such as slow:1@2x0.3; got slow:1@2"),
        ("kill:1@2x3", "kill lasts no time; leave x3 out"),
        ("cancel@2", "cancel, and only that, needs a number of requests"),
    ],
)
def test_a_fault_that_means_nothing_is_refused_with_what_would(text, words):
    with pytest.raises(ValueError, match=words):
        parse_schedule(text)


def test_schedules_know_their_ranks():
    schedule = parse_schedule("kill:1@2, kill:3@lost")
    with pytest.raises(ValueError, match=r"ranks are 0..2 with --ranks 3; got kill:3@lost"):
        schedule.checked(3, 1)
    assert not schedule.checked(4, 2).refuses
    assert schedule.checked(4, 1).refuses  # two may be gone where one can be done without
    assert str(schedule.shifted(1, 4)) == "kill:2@2, kill:0@lost"


def test_schedules_in_files(tmp_path):
    path = tmp_path / "some.json"
    written = [parse_schedule("kill:1@2", 3), Schedule((Injection("cancel", number=1),), 5, True)]
    path.write_text(json.dumps({"schedules": [schedule.to_dict() for schedule in written]}))
    assert read_schedules(path) == written
    path.write_text('{"faults": ["kill:1@2"]}')
    assert read_schedules(path, 7) == [parse_schedule("kill:1@2", 7)]
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "has no schedule"),
        ('{"faults": "kill:1"}', r'a schedule is \{"faults"'),
        ('{"faults": [], "seeds": 1}', "a schedule is"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_schedules(path)


def test_drawn_schedules_are_of_all_kinds_and_leave_enough_ranks():
    kinds, refusals = set(), 0
    for seed in range(200):
        schedule = draw(seed, ranks=4, spare_ranks=2)
        assert schedule == draw(seed, ranks=4, spare_ranks=2)
        assert parse_schedule(str(schedule), seed).injections == schedule.injections
        out = frozenset().union(*(injection.ends for injection in schedule.injections))
        assert len(out) <= (3 if schedule.refuses else 2)
        if any(injection.kind == "kill_holders" for injection in schedule.injections):
            assert len(schedule.injections) == 1  # there may be two of them: no other may be out
        kinds |= {injection.kind for injection in schedule.injections}
        refusals += schedule.refuses
    assert kinds == set(COVERS)
    assert 5 < refusals < 40
    covered = {fault for kind in kinds for fault in COVERS[kind]}
    assert covered == {f"F{i}" for i in range(1, 18)} - {"F8"}  # the controller's own death


def test_a_cluster_that_can_do_without_nobody_has_no_drawn_schedules():
    with pytest.raises(ValueError, match="raise --redundant-experts"):
        draw(0, ranks=4, spare_ranks=0)


# -- what became of requests -------------------------------------------------------------------------


def _record(tokens, reason="length", ends=1, **more):
    return Record(
        0, 0.0, list(tokens), [0.1 * i for i in range(len(tokens))], ends, 1.0, reason, **more
    )


@pytest.mark.parametrize(
    ("record", "counts"),
    [
        (_record(EXPECTED[0]), {"completed": 1}),
        (_record(EXPECTED[0][:2], "cancelled", cancelled=True), {"cancelled": 1}),
        (_record(EXPECTED[0][:2], "cancelled"), {"lost": 1}),  # nobody asked for that
        (_record(EXPECTED[0][:2], None, ends=0), {"lost": 1}),
        (_record(EXPECTED[0][:2]), {"lost": 1}),
        (_record([], "error", error="XlaRuntimeError: internal"), {"lost": 1}),
        (_record([], "error", error="CoverageLost: no copy of expert 3"), {"refused": 1}),
        (_record(EXPECTED[0], ends=2), {"duplicated": 1}),
        (_record([5, 6, 7, 6, 7, 8]), {"duplicated": 1}),
        (_record([*EXPECTED[0], 1]), {"duplicated": 1}),
        (_record([5, 6, 1, 8, 2]), {"wrong_tokens": 2}),
        (_record([1, 2], "cancelled", cancelled=True), {"wrong_tokens": 2}),
    ],
)
def test_requests_are_counted_by_what_became_of_them(record, counts):
    total, problems = checks.count([record], EXPECTED, refuses=True)
    assert total == checks.Counts(**counts)
    assert bool(problems) == bool({"lost", "duplicated", "wrong_tokens"} & set(counts))


def test_a_refusal_is_a_loss_where_enough_ranks_are_left():
    record = _record([], "error", error="CoverageLost: no copy of expert 3")
    assert checks.count([record], EXPECTED, refuses=False)[0] == checks.Counts(lost=1)


def _event(type_, epoch, at=1.0, seconds=0.5, min_copies=1, ranks=(1,), **phases):
    active = (0, 1) if type_ == "joined" else (0,)
    return Event(type_, ranks, epoch, at, seconds, phases, active, min_copies)


def test_epochs_that_do_not_grow_and_experts_without_a_copy_are_found():
    good = [_event("lost", 1), _event("joined", 2)]
    assert checks.of_events(good, 0, False) == []
    assert checks.of_events(good, 1, False) == ["epoch 1 of lost (1,) follows 1"]
    assert "no copy" in checks.of_events([_event("lost", 1, min_copies=0)], 0, False)[0]
    assert checks.of_events([_event("lost", 1, min_copies=0)], 0, True) == []


# -- pauses ------------------------------------------------------------------------------------------


def test_a_pause_is_the_gap_around_its_event_and_its_phases_add_up():
    times = [0.0, 0.5, 0.9, 2.0, 2.1]
    records = [
        Record(0, 0.0, [1] * 4, [0.0, 0.5, 0.9, 2.1], 1, 2.1, "length"),
        Record(0, 0.0, [1], [2.0], 1, 2.0, "length"),
    ]
    assert metrics.token_times(records).tolist() == times
    event = _event("lost", 1, at=1.2, seconds=0.6, abort=0.2, plan=0.4)
    (pause,) = metrics.pauses_of([event], records, [(1.0, (1,)), (1.1, (3,))], began=0.0)
    assert pause.seconds == pytest.approx(1.1) == pytest.approx(sum(pause.phases.values()))
    expected = {"before": 0.1, "detect": 0.2, "abort": 0.2, "plan": 0.4, "refill": 0.2}
    assert pause.phases == pytest.approx(expected)
    assert pause.everyone_s == pytest.approx(0.9)
    assert metrics.pauses_of([_event("lost", 1, at=3.0)], records, [], 0.0) == []  # nothing after


def _run(problems=()):
    times = np.concatenate(
        [np.arange(0, 3, 0.01), np.arange(3.5, 10, 0.02), np.arange(10.1, 12, 0.01)]
    )
    events = [
        _event("lost", 1, at=3.05, seconds=0.4, abort=0.1, plan=0.3),
        _event("joined", 2, at=10.0, seconds=0.1, move=0.1),
    ]
    records = [Record(0, 0.0, [1] * len(times), times.tolist(), 1, 12.0, "length")]
    pauses = metrics.pauses_of(events, records, [(3.0, (1,))], 0.0)
    counts = checks.Counts(completed=3, lost=len(problems))
    marks = ((3.0, "kill:1@3"), (3.05, "lost 1"), (10.0, "joined 1"))
    schedule = parse_schedule("kill:1@3", 2)
    return Run(
        schedule, counts, tuple(problems), tuple(pauses), 0, times, marks, tuple(events), 13.0, 14.0
    )


def test_throughput_after_a_loss_is_measured_from_three_seconds_on_until_the_return():
    run = _run()
    assert rates_after_loss(run) == pytest.approx([50.0], rel=0.02)
    second = dataclasses.replace(run.pauses[0], at_s=6.5, active=run.pauses[0].active - 1)
    more = dataclasses.replace(run, pauses=(run.pauses[0], second, run.pauses[1]))
    assert (
        rates_after_loss(more) == []
    )  # too soon another; and then fewer are left than are compared


def test_the_report_has_the_figures_that_are_compared():
    found = Findings([_run(), _run()], [60.0], [Restart(30.0, np.arange(-2, 40, 0.1))])
    found.steady = {"elastic": [10.1, 9.9, 10.2], "frozen": [10.0, 9.9, 10.0]}
    rows, ratios = summarise(found)
    assert ratios["pause_s"] == ratios["pause_worst_s"] == pytest.approx(0.51, abs=0.02)
    assert ratios["reintegration_pause_s"] == pytest.approx(0.12, abs=0.02)
    assert ratios["throughput_after_ratio"] == pytest.approx(50 / 60, rel=0.02)
    assert ratios["steady_overhead"] == pytest.approx(0.01)
    assert (ratios["lost"], ratios["duplicated"], ratios["wrong_tokens"]) == (0, 0, 0)
    assert ratios["survivor_compiles"] == ratios["problems"] == 0
    assert {"pause: detect", "pause: abort", "pause: refill"} <= {row["name"] for row in rows}


def test_the_page_is_one_file_that_says_what_did_not_hold(tmp_path):
    found = Findings([_run(), _run(["request 1: <has not ended>"])])
    report = make_report("recover", *summarise(found), command="jaxmoe recover --seed 2")
    pages.write(tmp_path, found, report)
    page = (tmp_path / "report.html").read_text()
    image = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    assert image.startswith(b"\x89PNG") and image == (tmp_path / "timeline.png").read_bytes()
    assert "not everything held" in page and "&lt;has not ended&gt;" in page
    assert "jaxmoe recover --seed 2" in page and "kill:1@3" in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)  # nothing is fetched
