"""An engine for the tests that leave it as it was."""

from collections.abc import Iterator

import pytest
from engine.support import assert_empty, new_engine

from jaxmoe.engine import Engine


@pytest.fixture(scope="module")
def warm_engine() -> Iterator[Engine]:
    """Everything is compiled; engines of a test's own share that, so that nobody's deadline passes meanwhile."""
    with new_engine() as engine:
        engine.warmup()
        yield engine


@pytest.fixture
def shared(warm_engine) -> Iterator[Engine]:
    """``warm_engine``, in which nothing is left after the test."""
    yield warm_engine
    assert_empty(warm_engine)
