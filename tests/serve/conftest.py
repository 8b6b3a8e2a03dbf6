"""Fixtures of the server's tests."""

import pytest


@pytest.fixture(scope="session")
def engine():
    """A small engine that all tests of a process share; leave nothing running in it."""
    pytest.importorskip("starlette")
    from serve.support import make_engine

    with make_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    """The address of a real server over ``engine``."""
    from serve.support import serving

    with serving(engine) as url:
        yield url
