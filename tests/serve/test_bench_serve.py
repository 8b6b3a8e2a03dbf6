"""The load generator: what it asks, how it counts, and that it notices a server that counts otherwise."""

import asyncio
import json

import pytest

pytest.importorskip("starlette")

from bench import _load, _metrics, serve
from jaxmoe.cli import bench as cli_bench
from jaxmoe.cli import main


class Clock:
    """A target whose requests take a while, and that counts how many it has at a time."""

    def __init__(self, seconds=0.02):
        self.seconds, self.now, self.most = seconds, 0, 0

    async def send(self, item, record):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        record.ended, record.outcome = record.began + self.seconds, "ok"


def record(began, times, tokens, ended, outcome="ok"):
    return _load.Record(5, began, 0.0, [(t, 1) for t in times], ended, tokens, outcome)


def test_requests_are_the_same_for_a_seed_and_within_the_lengths():
    items = _load.random_items(500, [3, 9], [2, 4], 7, rate=50.0, shared_prefix=6)
    assert items == _load.random_items(500, [3, 9], [2, 4], 7, rate=50.0, shared_prefix=6)
    assert items != _load.random_items(500, [3, 9], [2, 4], 8, rate=50.0, shared_prefix=6)
    assert {len(item.prompt) - 6 for item in items} == set(range(3, 10))
    assert {item.output_tokens for item in items} == {2, 3, 4}
    assert len({item.prompt[:6] for item in items}) == 1
    # 500 exponential gaps of mean 1/50: the sum's standard deviation is sqrt(500)/50 = 0.45 s; six of them.
    assert abs(items[-1].arrival_s - 10) < 2.7


def test_a_trace_gives_its_lengths_in_order_of_arrival(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("output_tokens,arrival_s,prompt_tokens\n4,1.5,7\n2,0.5,3\n")
    items = _load.trace_items(path, 0)
    assert [(i.arrival_s, len(i.prompt), i.output_tokens) for i in items] == [
        (0.5, 3, 2),
        (1.5, 7, 4),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n1,2\n", "output_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n0,1,x\n", "line 3"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n0,0,1\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n0\n", "line 2"),
    ],
)
def test_a_bad_trace_is_named(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _load.trace_items(path, 0)


def test_a_closed_loop_has_so_many_requests_and_an_open_loop_waits_for_none():
    items = _load.random_items(20, [1, 1], [1, 1], 0, rate=2000.0)
    target = Clock()
    run = _load.Run(target)
    asyncio.run(run.closed_loop(items, 4))
    assert target.most == 4 and len(run.records) == 20 and run.in_flight == 0
    target = Clock(0.3)
    asyncio.run(_load.Run(target).open_loop(items))
    assert target.most == 20


def test_latency_and_goodput_are_what_the_words_say():
    one = record(10.0, [10.5, 11.0, 12.5], 5, 13.0)
    assert (one.ttft_s, one.tpot_s, one.total_s) == (0.5, 0.5, 3.0)
    assert record(0.0, [1.0], 1, 1.0).tpot_s is None
    assert serve.meets(one, 0.5, 0.5)
    assert not serve.meets(one, 0.4, 0.5) and not serve.meets(one, 0.5, 0.4)
    assert not serve.meets(record(0.0, [0.1], 1, 0.2, "failed"), 9, 9)


def test_counts_that_disagree_are_named():
    records = [record(0.0, [1.0, 2.0], 4, 2.0), record(0.0, [], 0, 1.0, "refused")]
    text = """
jaxmoe_requests_finished_total{reason="length"} 1.0
jaxmoe_prompt_tokens_total 5.0
jaxmoe_cached_tokens_total 0.0
jaxmoe_generated_tokens_total 4.0
jaxmoe_preemptions_total 0.0
jaxmoe_time_to_first_token_seconds_count 1.0
jaxmoe_time_to_first_token_seconds_sum 0.9
jaxmoe_expert_tokens_total{layer="0",expert="0"} 10.0
jaxmoe_expert_tokens_total{layer="0",expert="1"} 6.0
jaxmoe_expert_tokens_total{layer="1",expert="0"} 16.0
jaxmoe_expert_tokens_total{layer="1",expert="1"} 0.0
"""
    grown = _metrics.growth({}, _metrics.parse(text))
    rows, lines = _metrics.compare(records, grown, [0, 0, 1])
    assert lines == [] and len(rows) == 7

    def lines_with(old, new):
        return _metrics.compare(records, _metrics.parse(text.replace(old, new)), [])[1]

    assert lines_with("generated_tokens_total 4.0", "generated_tokens_total 3.0")
    (line,) = lines_with('layer="1",expert="1"} 0.0', 'layer="1",expert="1"} 1.0')
    assert line.startswith("expert visits") and "client 32, server 33" in line
    (line,) = lines_with("seconds_sum 0.9", "seconds_sum 1.2")
    assert "later than the client" in line
    (line,) = _metrics.compare(records, grown, [3, 3])[1]
    assert line.startswith("queue")


@pytest.mark.parametrize("how", [["--concurrency", "6"], ["--rate", "40"]])
def test_a_real_server_counts_what_the_client_counts(url, tmp_path, capsys, how):
    lengths = ["--requests", "12", "--prompt", "4", "40", "--new", "2", "12"]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "plot.png")]
    serve.main(["--url", url, *how, *lengths, *files])
    assert "The server's counts agree with the client's." in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["requests ok"]["value"] == 12
    assert rows["output tokens: client"]["value"] == rows["output tokens: client"]["server"] > 0
    for kind in ("ttft", "tpot", "end to end"):
        values = [rows[f"{kind}, p{q}"]["value"] for q in (50, 90, 99)]
        assert 0 < values[0] <= values[1] <= values[2]
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match="no server answers"):
        serve.main(["--url", "http://127.0.0.1:1", "--requests", "1"])


def test_reports_do_not_hold_the_api_key():
    line = serve._command(["--url", "u", "--api-key", "secret", "--api-key=secret"])
    assert "secret" not in line and "--api-key KEY" in line


def test_bench_names_what_there_is_and_needs_a_checkout(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "serve" in capsys.readouterr().err
    monkeypatch.setattr(cli_bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--help"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "needs a source checkout" in line


def test_bench_passes_options_on(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "prefill", "--help"])  # one that is not imported here
    assert exit_.value.code == 0
    assert "--preset" in capsys.readouterr().out
