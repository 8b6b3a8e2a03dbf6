"""SIGKILL at every stage of a save, in a real process: the step before stays usable."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from checkpoint.support import REPOSITORY, SMALLEST, assert_trees_equal, numbered_params

from jaxmoe import checkpoint

_SCRIPT = textwrap.dedent("""
    import os, signal, sys, threading
    sys.path.insert(0, "tests")
    from checkpoint.support import REPOSITORY, SMALLEST, numbered_params
    from jaxmoe import checkpoint
    from jaxmoe.checkpoint import _manifest, _steps, native

    root, stage, step = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save(root, numbered_params(SMALLEST, offset=1.0), SMALLEST, 1)
    if stage == "while arrays are written":
        arrays = os.path.join(root, f".tmp-{step}", "state.orbax-checkpoint-tmp")

        def watch():
            while not os.path.exists(arrays):
                pass
            die()

        threading.Thread(target=watch).start()
    elif stage == "before the metadata":
        _manifest.fsync = die
    elif stage == "before the manifest":
        _manifest.write = die
    elif stage == "before the rename":
        _steps.commit = die
    elif stage == "between the renames":
        _steps.os.rename = die  # the old step has just been moved away
    elif stage == "before the old one is removed":
        _steps.shutil.rmtree = die
    checkpoint.save(root, numbered_params(SMALLEST, offset=2.0), SMALLEST, step, overwrite=True)
    print("saved", flush=True)
""")
# (stage, step saved when the process dies, step and offset found afterwards)
CASES = [
    ("while arrays are written", 2, 1, 1.0),
    ("before the metadata", 2, 1, 1.0),
    ("before the manifest", 2, 1, 1.0),
    ("before the rename", 2, 1, 1.0),
    ("between the renames", 1, 1, 1.0),
    ("before the old one is removed", 1, 1, 2.0),
]


def _assert_offset(root, step, offset):
    restored = checkpoint.restore(root)
    assert restored.step == step
    assert_trees_equal(restored.params, numbered_params(SMALLEST, offset=offset))
    down = restored.params["mtp"][0]["layer"]["moe"]["experts"]["down"]
    experts = checkpoint.restore_experts(root, [3], [2])
    np.testing.assert_array_equal(experts[3][2]["down"], down[2])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """{stage: (its directory, its finished process)}; they run side by side, being mostly imports."""
    started = {}
    for stage, dying, *_ in CASES:
        root = tmp_path_factory.mktemp("killed")
        command = [sys.executable, "-c", _SCRIPT, root, stage, str(dying)]
        pipe = subprocess.PIPE
        started[stage] = (
            root,
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY),
        )
    finished = {}
    for stage, (root, process) in started.items():
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        finished[stage] = root, process.returncode, out, err
    return finished


@pytest.mark.parametrize(("stage", "dying", "step", "offset"), CASES, ids=[c[0] for c in CASES])
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(killed, stage, dying, step, offset):
    root, code, out, err = killed[stage]
    assert code == -signal.SIGKILL, (code, out, err)
    assert "saved" not in out
    assert any(p.name.startswith(".") for p in root.iterdir())  # it did die in the middle
    assert checkpoint.latest_step(root) == step
    _assert_offset(root, step, offset)
    checkpoint.save(root, numbered_params(SMALLEST, offset=3.0), SMALLEST, 3)
    assert sorted(p.name for p in root.iterdir()) == ["1", "3"]
    _assert_offset(root, 3, 3.0)


def test_a_save_that_raises_leaves_no_litter(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 1)

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr("jaxmoe.checkpoint._manifest.write", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, numbered_params(SMALLEST), SMALLEST, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
