"""What the tests of clusters share."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> pathlib.Path:
    """A folder of compiled programs for all clusters of this run of the tests."""
    folder = tmp_path_factory.getbasetemp().parent / "programs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
