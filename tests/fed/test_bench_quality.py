"""The comparison's presets: what differs between methods, and what must not."""

import dataclasses

import pytest

from bench import fed_quality
from fed.compare import METHODS

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", fed_quality.PRESETS)
def test_learning_rates_are_of_methods_that_there_are(name):
    assert set(dict(fed_quality.PRESETS[name].learning_rates)) <= set(METHODS)


def test_a_run_trains_with_its_own_learning_rate(monkeypatch):
    """What the run is given, not only what the preset says."""
    given = {}

    def stop(method, cut, partition, models, options, koala):
        given[method] = options.local.learning_rate
        raise InterruptedError

    monkeypatch.setattr(fed_quality, "run_method", stop)
    preset = dataclasses.replace(
        fed_quality.PRESETS["digits"],
        small=("mlp:4",),
        large="mlp:8",
        learning_rates=(("fedavg-large", 0.25),),
    )
    for method in ("fedavg-large", "koala-homo"):
        with pytest.raises(InterruptedError):
            fed_quality.run_one(preset, None, method, "iid", 100)
    assert given == {"fedavg-large": 0.25, "koala-homo": preset.local.learning_rate}
