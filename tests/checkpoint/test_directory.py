"""Whatever a directory holds: Hugging Face's files, native steps, or a training run."""

import numpy as np
import pytest
from checkpoint.support import SMALLEST as CONFIG
from checkpoint.support import numbered_params

from jaxmoe import checkpoint


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """{kind: directory} of the same model; a run with an older step of another one."""
    root = tmp_path_factory.mktemp("kinds")
    params = numbered_params(CONFIG)
    older = numbered_params(CONFIG, 1.0)
    checkpoint.save_hf(root / "hf", params, CONFIG)
    checkpoint.save(root / "run" / "checkpoints", older, CONFIG, step=3)
    checkpoint.save(root / "run" / "checkpoints", params, CONFIG, step=12)
    steps = root / "run" / "checkpoints"
    return {"hf": root / "hf", "run": root / "run", "native": steps, "step": steps / "12"}


def embedding(params):
    return np.asarray(params["embed"]["weight"])


@pytest.mark.parametrize("kind", ["hf", "run", "native", "step"])
def test_every_kind_is_found_and_loaded(directories, kind):
    params, config = checkpoint.load(directories[kind])
    assert config == checkpoint.load_config(directories[kind])
    assert config.num_nextn_predict_layers == CONFIG.num_nextn_predict_layers and "mtp" in params
    expected = numbered_params(CONFIG)
    assert np.array_equal(embedding(params), embedding(expected))
    params, config = checkpoint.load(directories[kind], mtp=False)
    assert "mtp" not in params and config.num_nextn_predict_layers == 0


def test_what_was_located_stays_the_same_when_a_run_goes_on(directories, tmp_path):
    first = numbered_params(CONFIG, 2.0)
    checkpoint.save(tmp_path / "checkpoints", first, CONFIG, step=1)
    found = checkpoint.locate(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", checkpoint.load(directories["hf"])[0], CONFIG, step=2)
    assert np.array_equal(embedding(checkpoint.load(found)[0]), embedding(first))
    assert not np.array_equal(embedding(checkpoint.load(tmp_path)[0]), embedding(first))


def test_a_directory_without_a_checkpoint_is_one_line(directories, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in '.*': neither"):
        checkpoint.locate(tmp_path)
    with pytest.raises(ValueError, match="no step 7"):
        checkpoint.load(directories["native"] / "7")
