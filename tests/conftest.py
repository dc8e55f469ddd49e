"""JAX made strict for tests: 8 CPU devices, no silent rank promotion, no key used twice, full precision."""

import collections
import contextlib
import os
import tempfile

from program import QUICK, Forks, load_digits_once, share_compiled_programs

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_default_matmul_precision", "highest")

# Every call of an annotated function checks shapes and types.
install_import_hook("vae_jax", "beartype.beartype")


load_digits_once()


# All processes of a session share their compiled programs, and several sessions if the variable names a folder.
if "VAE_JAX_TESTS_COMPILED" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="vae_jax")
    os.environ["VAE_JAX_TESTS_COMPILED"] = COMPILED.name
share_compiled_programs()


@pytest.fixture(scope="session")
def mnist_dir():
    """The folder of the four MNIST files, named by VAE_JAX_MANUAL_DIR."""
    folder = os.environ.get("VAE_JAX_MANUAL_DIR")
    if not folder:
        pytest.skip("VAE_JAX_MANUAL_DIR does not name a folder with the four MNIST files")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A finished run: its last state, its directory, moved from the place of its training, its job and its config.

    It is never written to: a test that would do that copies it.
    """
    from small_run import run_job, small_job  # after the import hook above, since it imports vae_jax

    job, config = small_job(drawn=True)
    path = tmp_path_factory.mktemp("small")
    state, directory = run_job(job, config, path / "before")
    directory.path = directory.path.rename(path / "after")
    return state, directory, job, config


@pytest.fixture(scope="session")
def forks():
    """`forks(*arguments)` starts `python ARGUMENTS` in a fork that needs no imports; see program.py."""
    forks = Forks()
    yield forks
    forks.close()


LONGEST = "test_robustness.py", "test_augmentation.py", "test_hosts.py", "test_report.py"


def pytest_collection_modifyitems(items):
    """The files with the longest tests come first, so that no worker starts one of them last."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


TRIED, HELD = collections.Counter(), collections.Counter()


@pytest.fixture(scope="session")
def tally():
    """`with tally("interruptions", 3):` counts what a test tries, and how often the promise held."""

    @contextlib.contextmanager
    def count(kind, times=1):
        TRIED[kind] += times
        yield
        HELD[kind] += times

    return count


def pytest_sessionfinish(session):
    """A worker of pytest-xdist sends its counts to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = dict(TRIED), dict(HELD)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if hasattr(node, "workeroutput"):  # a crashed worker has none
        for total, counts in zip((TRIED, HELD), node.workeroutput["tally"]):
            total.update(counts)


def pytest_terminal_summary(terminalreporter):
    """Print how often the robustness tests tried to lose data, and how often they did."""
    if TRIED:
        terminalreporter.section("nothing is lost")
        terminalreporter.write_line(f"{'':15} tried   lost data")
        for kind, times in sorted(TRIED.items()):
            lost = times - HELD[kind]
            terminalreporter.write_line(f"{kind:15} {times:5} {lost:11}")
