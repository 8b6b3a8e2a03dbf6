"""The command line, in real processes but for mistakes of users: what it prints, what it writes, how it fails."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.report import write_report

pytest.importorskip("tyro")
from jaxmoe.cli import main  # noqa: E402


def run(*args, timeout=240, **env):
    """Runs ``jaxmoe`` with arguments; returns the completed process."""
    command = [sys.executable, "-c", "from jaxmoe.cli import main; main()", *map(str, args)]
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAXMOE_TRACEBACK")}
    root = str(os.path.dirname(os.path.dirname(jaxmoe.__file__)))
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean | {"PYTHONPATH": root, "COLUMNS": "200", "NO_COLOR": "1"} | env,
        check=False,
    )


def mistake(capsys, *args):
    """Runs ``jaxmoe`` in this process, which starts faster; returns the one line that it ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error:")
    return lines[0]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A native checkpoint of the tiny preset."""
    directory = tmp_path_factory.mktemp("native")
    config = jaxmoe.presets["tiny"]
    checkpoint.save(directory, jaxmoe.init_params(config, jax.random.key(0)), config, step=3)
    return directory


def test_info_prints_the_released_parameter_count_without_allocating():
    result = run("info", "deepseek_v32")
    assert result.returncode == 0, result.stderr
    assert "671,877,944,064" in result.stdout
    assert "48,068" in result.stdout  # fp8 cache bytes per token: 61 x (656 + 132)


def test_info_report_has_the_common_format(tmp_path):
    result = run("info", "tiny", "--json", tmp_path / "info.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "info.json").read_text())
    assert set(report) == {"bench", "command", "date", "machine", "versions", "rows", "ratios"}
    values = {row["name"]: row["value"] for row in report["rows"]}
    assert values["parameters"] == jaxmoe.param_count(jaxmoe.presets["tiny"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["info", "no_such_model"], ["no_such_model", "preset", "tiny"]),
        (["generate", "no_such_directory"], ["no_such_directory", "check the path"]),
        (["generate", "tiny"], ["tiny", "no weights", "train"]),
        (["generate", "tiny", "--seed", 10**30], ["seed", "64 bits", str(10**30)]),
        (["info", "tiny", "--json", __file__ + "/a.json"], [__file__, "check the path"]),
        (["info", "tiny", "--json", os.path.dirname(__file__)], ["tests", "directory"]),
        (["train", "--steps", 1, "--output", __file__], [__file__, "exists"]),
        (["train", "--model", "deepseek_v32"], ["683,501,971,712 parameters", "GiB", "tiny"]),
        (["train", "--learning-rate", "nan"], ["learning_rate", "positive", "nan"]),
        (["train", "--beta1", "1"], ["beta1", "[0, 1)", "1.0"]),
        (["train", "--data", "no_such_text"], ["--data no_such_text", "does not exist"]),
        (["train", "--tokenizer", __file__], [__file__, "tokenizer.json", "get it again"]),
        (["plot", "no_such_run"], ["no_such_run", "train first"]),
    ],
)
def test_a_users_mistake_is_one_line(args, words, capsys):
    line = mistake(capsys, *args)
    for word in words:
        assert word in line


def test_a_users_mistake_ends_a_process_without_a_traceback():
    result = run("info", "no_such_model")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error:")


@pytest.mark.parametrize("metadata", [None, b"", b"{}"])
def test_info_names_the_damaged_file_of_a_native_checkpoint(native, tmp_path, metadata, capsys):
    shutil.copytree(native, tmp_path / "native")
    path = tmp_path / "native" / "3" / "metadata.json"
    path.unlink()
    if metadata is not None:
        path.write_bytes(metadata)
    line = mistake(capsys, "info", tmp_path / "native")
    assert str(path) in line and "restore another step" in line


def test_generate_streams_the_same_text_for_the_same_seed(native, tmp_path):
    args = ["generate", native, "--prompt", "abc", "--max-new-tokens", 12, "--seed", 5]
    first = run(*args, "--json", tmp_path / "a.json")
    second = run(*args)
    other = run(*args[:-1], 6)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("abc")
    assert first.stdout == second.stdout != other.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert first.stdout.strip("\n") == "abc" + report["rows"][0]["text"].strip("\n")


def test_generate_names_a_bad_option_and_its_value(native):
    result = run("generate", native, "--top-p", "1.5")
    assert result.returncode == 1 and "top_p" in result.stderr and "1.5" in result.stderr
    result = run("generate", native, "--prompt", "")
    assert result.returncode == 1 and "prompt" in result.stderr


def test_convert_goes_to_hugging_face_and_back_without_loss(native, tmp_path):
    there = run("convert", native, tmp_path / "hf")
    assert there.returncode == 0, there.stderr
    back = run("convert", tmp_path / "hf", tmp_path / "native", "--step", 7)
    assert back.returncode == 0, back.stderr
    before, after = checkpoint.restore(native), checkpoint.restore(tmp_path / "native")
    assert after.step == 7
    assert before.config == after.config
    same = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), before.params, after.params
    )
    assert jax.tree.all(same)


def test_convert_refuses_to_overwrite(native, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    result = run("convert", native, tmp_path / "full")
    assert result.returncode == 1 and "full" in result.stderr
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_convert_can_leave_out_the_multi_token_prediction_layers(native, tmp_path):
    result = run("convert", native, tmp_path / "hf", "--no-mtp")
    assert result.returncode == 0, result.stderr
    params, config = checkpoint.load_hf(tmp_path / "hf")
    assert config.num_nextn_predict_layers == 0 and "mtp" not in params


def test_a_report_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_report(tmp_path / "taken", {})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
