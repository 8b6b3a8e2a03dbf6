"""Test environment: eight simulated CPU devices, strict promotion, run-time type checks of the packages.

The first lines run before JAX creates its backends and before the packages are imported; keep them there.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

DEVICES = 8
MOST_MAPS = 20_000
_FLAGS = {
    "--xla_force_host_platform_device_count": DEVICES,
    # XLA ends the process when a simulated device is this late to a collective: the default of 40 s is too little
    # for eight threads on a busy two-core machine.
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
}
if importlib.metadata.version("jaxlib").split(".")[:2] == ["0", "10"]:
    # XLA's older way to make CPU code of a fusion; it compiles in less than half the time. Versions from 0.11.2 on have no such flag.
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Of this run: workers, and the processes that tests start, compile a program once between them.
    _programs = tempfile.mkdtemp(prefix="jaxmoe-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

COMPILE_FAST = (
    "checkpoint",
    "elastic",
    "engine",
    "fed",
    "moe",
    "parity",
    "quant",
    "serve",
    "train",
    "test_cli.py",
    "test_decode.py",
    "test_generate.py",
)  # directories and files of tests
_compiler_now = {"less": False}

jaxtyping.install_import_hook(["fed", "jaxmoe", "pallas_kernels", "quant"], "typechecking.check")

# Fixed examples: a run never differs from the one before. Compilation makes single examples slow: no deadline.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.differing_executors,  # A case is inherited by one class per backend.
    ],
)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(items):
    """Skips the tests of hardware that is not here; marks those of ``slow_cases.txt`` as slow."""
    backend = jax.default_backend()
    lines = (pathlib.Path(__file__).parent / "slow_cases.txt").read_text().splitlines()
    slow = [line for line in lines if line and not line.startswith("#")]
    for item in items:
        # Not fnmatch: names hold brackets.
        if any(all(part in item.nodeid for part in line.split(" * ")) for line in slow):
            item.add_marker("slow")
        for platform in ("gpu", "tpu"):
            if item.get_closest_marker(platform) and backend != platform:
                item.add_marker(
                    pytest.mark.skip(reason=f"needs a {platform.upper()}; JAX runs on {backend}")
                )


@pytest.fixture(autouse=True)
def _type_checks(request):
    """Turns the run-time type checks off for tests that pass wrong types on purpose."""
    jaxtyping.config.update(
        "jaxtyping_disable", request.node.get_closest_marker("misuse") is not None
    )
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _compiler(request):
    """XLA optimises less where tests compile large programs and run them a few times: half the time."""
    path = request.node.path
    less = path.name in COMPILE_FAST or path.parent.name in COMPILE_FAST
    if _compiler_now["less"] != less:
        jax.config.update("jax_disable_most_optimizations", less)
        jax.clear_caches()
        _compiler_now["less"] = less
    # Elastic ranks as threads carry programs between devices themselves (``elastic.executables``).
    cached = path.parent.name != "elastic"
    if jax.config.jax_enable_compilation_cache != cached:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forgets compiled programs before there are too many of them.

    Each has memory maps of its own, of which Linux allows a process 65530: XLA ends the process when there is none left.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def slow_too(request):
    """Whether slow tests run (`make test-all`)."""
    return "not slow" not in request.config.getoption("markexpr")


@pytest.fixture(scope="session")
def devices():
    """The eight simulated CPU devices."""
    found = jax.devices("cpu")
    if len(found) < DEVICES:
        pytest.fail(
            f"XLA_FLAGS gives {len(found)} CPU devices and the tests need {DEVICES}; unset it"
        )
    return found[:DEVICES]


@pytest.fixture(scope="session")
def tiny_config():
    """The smallest preset: every feature of V3.2."""
    import jaxmoe

    return jaxmoe.presets["tiny"]


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random float32 parameters of ``tiny_config``; do not donate them."""
    import jaxmoe

    return jaxmoe.init_params(tiny_config, jax.random.key(0))


@pytest.fixture
def rng(request):
    """A NumPy generator whose seed is the test's own name: independent of order and of other tests."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
