"""``jaxmoe fed``: a table, a report, and mistakes in one line."""

import json

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
from jaxmoe.cli import main  # noqa: E402

SMALL = [
    *("--clients", "5", "--rounds", "2", "--epochs", "1", "--small", "mlp:4", "--large", "mlp:8"),
    *("--koala.reverse.steps", "5", "--koala.forward.steps", "5"),
]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def mistake(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error:")
    return lines[0]


def test_compare_prints_a_table_and_writes_a_report(capsys, tmp_path):
    report = tmp_path / "fed.json"
    args = ["compare", "koala-homo", "fedavg-small", *SMALL, "--output", str(tmp_path / "runs")]
    main(["fed", *args, "--target", "0.05", "--json", str(report)])
    out = capsys.readouterr().out
    assert "koala-homo" in out and "5 clients, 899 examples" in out and "of storage" in out
    found = json.loads(report.read_text())
    assert found["bench"] == "fed" and {"command", "date", "machine", "versions"} <= set(found)
    rows = {r["name"]: r for r in found["rows"]}
    assert 0 <= rows["koala-homo, large_accuracy"]["value"] <= 1
    assert rows["koala-homo, bytes_up"]["value"] == rows["fedavg-small, bytes_up"]["value"] > 0
    assert 0 < found["ratios"]["saved_storage"] < 1
    assert found["options"]["fleet"]["clients"] == 5
    assert (tmp_path / "runs" / "accuracy.png").exists()
    assert (tmp_path / "runs" / "koala-homo-seed0" / "rounds.jsonl").exists()


def test_compare_leaves_out_what_the_aggregator_hides(capsys):
    hidden = ["--aggregator", "private:1:0:5", "--rounds", "1"]
    main(["fed", "compare", "fedavg-small", "feddf", "fedmd", *SMALL, *hidden])
    out = capsys.readouterr().out
    assert "models and GaussianMean hides them: feddf, fedmd" in out and "privacy: (" in out
    table = out.split("test accuracy in %")[1]
    assert "fedavg-small" in table and "feddf" not in table


def test_run_reads_the_user_s_file(capsys, tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        f"{part}_{axis}": generator.integers(0, 10 if axis == "y" else 256, shape).astype(np.uint8)
        for part, count in (("train", 120), ("test", 30))
        for axis, shape in (("x", (count, 8, 8)), ("y", (count,)))
    }
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    main(["fed", "run", "fedavg-small", "--data", f"mnist:{path}", *SMALL, "--partition", "iid"])
    assert "5 clients, 84 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "fedsgd"], "method must be one of koala"),
        (["run", "--data", "mnist"], "mnist needs the path of its files"),
        (["run", "--small", "mlp:x"], "a model must be mlp:16"),
        (["run", "--alpha", "0"], "alpha must be positive"),
        (["run", "--partition", "natural"], "owners must say whose"),
        (["run", "--aggregator", "best"], "aggregator must be mean"),
        (["run", "feddf", "--aggregator", "secure"], "must show each client's update to feddf"),
        (
            ["run", "fedavg-small", "--clients", "5", "--poisoned", "5"],
            "among the 5, counted from 0",
        ),
        (["run", "--data", "mnist:/nowhere.npz"], "/nowhere.npz: No such file"),
    ],
)
def test_mistakes_are_one_line(capsys, args, message):
    assert message in mistake(capsys, "fed", *args)


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fed", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "run" in out and "compare" in out


def test_jaxmoe_does_not_load_the_package_above_it():
    import subprocess
    import sys

    code = "import sys, jaxmoe.cli.main; print('fed' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
