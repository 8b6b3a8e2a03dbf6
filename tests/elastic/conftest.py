"""What the tests of clusters share."""

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> pathlib.Path:
    """A folder of compiled programs for all clusters of this run of the tests."""
    base = tmp_path_factory.getbasetemp()  # of a worker, if there are several
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
