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


@pytest.fixture
def client(url):
    """The official client."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def says(monkeypatch):
    """Lets the next requests say given texts, in order. They need a bias, so that masks are applied at all."""
    from serve.support import Script

    texts = []

    def start(form, *rest):
        return Script(texts.pop(0)) if texts else None

    monkeypatch.setattr("jaxmoe.engine.grammar.start", start)
    return lambda *more: texts.extend(more)
