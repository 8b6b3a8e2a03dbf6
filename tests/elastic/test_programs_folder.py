"""The folder of compiled programs: one for each thing that they depend on, and nobody else's."""

import os

import pytest

import jaxmoe
from jaxmoe.elastic.cluster.programs import fingerprint, folder_for, users_folder
from jaxmoe.engine import EngineOptions

CONFIG = jaxmoe.presets["tiny"].replace(num_nextn_predict_layers=0)


SIZES = EngineOptions(max_running=4).sizes(256)
SETUP = (CONFIG, SIZES, "float32", 4)


@pytest.mark.parametrize(
    "other",
    [
        (CONFIG.replace(num_hidden_layers=2), SIZES, "float32", 4),
        (CONFIG, SIZES._replace(pages=7), "float32", 4),
        (CONFIG, SIZES._replace(cache_dtype="fp8"), "float32", 4),
        (CONFIG, SIZES, "bfloat16", 4),
        (CONFIG, SIZES, "float32", 5),
    ],
)
def test_whatever_changes_programs_changes_their_folder(other, tmp_path):
    assert folder_for(tmp_path, *SETUP) == folder_for(tmp_path, *SETUP)
    assert folder_for(tmp_path, *SETUP) != folder_for(tmp_path, *other)


def test_variables_that_change_programs_change_their_folder(monkeypatch):
    before = fingerprint(*SETUP)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_dump_to=")
    assert fingerprint(*SETUP) != before


def test_it_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = users_folder()
    assert base == tmp_path / "cache" / "jaxmoe" / "programs"
    assert folder_for(base, *SETUP).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("writable", ["the folder", "a file in it", "a folder above it"])
def test_what_others_can_write_to_is_refused(writable, tmp_path):
    folder = folder_for(tmp_path / "base", *SETUP)
    (folder / "step-1.4").write_bytes(b"")
    paths = {"the folder": folder, "a file in it": folder / "step-1.4"}
    place = paths.get(writable, folder.parent)
    place.chmod(0o777)
    with pytest.raises(ValueError, match="mode 777.*chmod go-w") as refused:
        folder_for(tmp_path / "base", *SETUP)
    assert str(place) in str(refused.value) and "\n" not in str(refused.value)
    place.chmod(0o1777)  # as /tmp: nobody can replace what lies in it
    if writable == "a folder above it":
        folder_for(tmp_path / "base", *SETUP)
    else:
        with pytest.raises(ValueError, match="mode 1777"):
            folder_for(tmp_path / "base", *SETUP)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_refused(tmp_path):
    folder = folder_for(tmp_path / "base", *SETUP)
    for place in (folder, folder.parent):
        os.chown(place, 12345, -1)
        with pytest.raises(ValueError, match="belongs to user 12345"):
            folder_for(tmp_path / "base", *SETUP)
        os.chown(place, 0, -1)
    folder_for(tmp_path / "base", *SETUP)
