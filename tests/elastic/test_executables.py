"""Compiled programs loaded onto devices that they were not compiled for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.elastic import executables
from jaxmoe.elastic.executables import Executables, export, load


def _program(devices):
    """A collective and each rank's own number: wrong devices would show."""
    mesh = Mesh(np.array(devices), ("x",))

    def body(scale, x):
        rows = x["rows"].reshape(len(devices), -1)
        moved = jax.lax.all_to_all(rows, "x", 0, 0, tiled=True).reshape(-1)
        return {
            "y": moved * scale[0] + jax.lax.axis_index("x").astype(jnp.float32),
            "sum": jax.lax.psum(moved.sum(), "x"),
        }

    spec = PartitionSpec("x")
    step = jax.shard_map(
        body, mesh=mesh, in_specs=(spec, spec), out_specs={"y": spec, "sum": PartitionSpec()}
    )
    sharding = NamedSharding(mesh, spec)
    n = len(devices)
    scale = jax.device_put(jnp.arange(1.0, n + 1), sharding)
    rows = jax.device_put(jnp.arange(n * n * 2.0), sharding)
    return jax.jit(step), (scale, {"rows": rows})


def _run(program, arguments):
    return jax.tree.map(np.asarray, program(*arguments))


def test_every_order_of_every_set_of_devices_gives_the_same(devices):
    step, arguments = _program(devices[:3])
    expected = _run(step, arguments)
    with executables.compilation_cache_off():
        portable = export(step.lower(*arguments).compile(), devices[:3])
    for chosen in itertools.islice(itertools.permutations(devices[:5], 3), 0, 60, 7):
        _, own = _program(chosen)
        got = load(portable, chosen)(*own)
        assert got["y"].sharding.mesh.devices.tolist() == list(chosen)
        np.testing.assert_array_equal(got["y"], expected["y"])
        np.testing.assert_array_equal(got["sum"], expected["sum"])


def test_a_program_is_compiled_once_for_each_number_of_devices(devices):
    cache = Executables()

    def get(chosen):
        step, arguments = _program(chosen)
        return _run(cache.get("step", chosen, lambda: step.lower(*arguments)), arguments)

    for chosen in (devices[:3], devices[2:5], devices[:3], devices[:2], devices[1:3]):
        get(chosen)
    counters = cache.counters
    assert (counters.compiled, counters.loaded, counters.ready) == (2, 2, 1)
    assert not counters.fallbacks


def test_another_process_finds_it_on_disk(devices, tmp_path):
    step, arguments = _program(devices[:2])
    Executables(tmp_path).get("step", devices[:2], lambda: step.lower(*arguments))
    other = Executables(tmp_path)
    own_step, own = _program(devices[3:5])
    program = other.get("step", devices[3:5], lambda: pytest.fail("compiled again"))
    np.testing.assert_array_equal(program(*own)["y"], own_step(*own)["y"])
    assert (other.counters.compiled, other.counters.loaded) == (0, 1)


def test_a_program_that_jax_has_in_its_own_cache_is_compiled_all_the_same(devices, tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, (str(tmp_path / "jax"), 0.0, True), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        step, arguments = _program(devices[:2])
        step.lower(*arguments).compile()  # now it is there
        assert any((tmp_path / "jax").iterdir())
        jax.clear_caches()
        expected = np.asarray(_program(devices[:2])[0](*arguments)["y"])
        Executables(tmp_path).get("step", devices[:2], lambda: step.lower(*arguments))
        other, own = Executables(tmp_path), _program(devices[3:5])[1]
        program = other.get("step", devices[3:5], lambda: pytest.fail("compiled again"))
        np.testing.assert_array_equal(program(*own)["y"], expected)
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_jax_that_has_changed_costs_a_compilation_and_says_so(devices, monkeypatch):
    cache = Executables()

    def get(chosen):
        step, arguments = _program(chosen)
        return _run(cache.get("step", chosen, lambda: step.lower(*arguments)), arguments)

    get(devices[:2])
    monkeypatch.setattr(executables, "_options", None)
    expected = _run(*_program(devices[2:4]))
    np.testing.assert_array_equal(get(devices[2:4])["y"], expected["y"])
    assert cache.counters.compiled == 2 and cache.counters.loaded == 0
    assert "TypeError" in cache.counters.fallbacks[0]


@pytest.mark.misuse
def test_another_number_of_devices_is_refused(devices):
    step, arguments = _program(devices[:2])
    with executables.compilation_cache_off():
        portable = export(step.lower(*arguments).compile(), devices[:2])
    with pytest.raises(ValueError, match="a program for 2 devices cannot be loaded onto 3"):
        load(portable, devices[:3])


def test_a_program_that_cannot_be_written_is_used_all_the_same(tmp_path, devices, monkeypatch):
    """XLA writes no sort that has run, and JAX gives the program that it has: then this process has it alone."""

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: `LessThan` is not serializable.")

    monkeypatch.setattr(executables, "export", refuse)
    sort, x = jax.jit(lambda x: jnp.sort(x)), jnp.array([3.0, 1.0, 2.0])
    cache = Executables(tmp_path)
    program = cache.get("sort", devices[:1], lambda: sort.lower(x))
    np.testing.assert_array_equal(program(x), [1.0, 2.0, 3.0])
    assert cache.get("sort", devices[:1], lambda: sort.lower(x)) is program
    assert cache.counters.compiled == 1 and not list(tmp_path.iterdir())
    assert "LessThan" in cache.counters.fallbacks[0]
