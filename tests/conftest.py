"""Shared by all tests: a private cache folder, the base model, and settings for few, repeatable
examples of each property.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# One thread per process, set before PyTorch counts the processors: the suite runs a worker on each,
# and two threads that synchronise after every product of a tiny model mostly wait. Tests of
# multi-threaded kernels set their threads themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from deepseek.checkpoint import hub

USER_HOME = hub.home()

# Shared machines stall for seconds, so no deadline; the same examples every time, so that failures
# are reproducible.
settings.register_profile(
    "suite",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="device of the tests marked gpu")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "fakegpu":
        import fake_gpu

        fake_gpu.register()  # before our modules are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that have slow tests: at the end, one of them would keep one worker busy
    while the others are idle.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the tests' caches and keys out of the user's folder, also in processes that tests start.

    The texts for calibrating gates are made once for all workers, since that takes as long as a
    whole test.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        workers = tmp_path_factory.getbasetemp()
        run = workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers
        public = run / "public"
        public.mkdir(exist_ok=True)
        (folder / "public").symlink_to(public)
        patch.setenv("DEEPSEEK_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Restore the package's logger: `serve` adds a handler for the test's captured output."""
    log = logging.getLogger("deepseek")
    before = (log.handlers, log.level, log.propagate)
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the default base model, fetched into the user's cache once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_HOME", str(USER_HOME))
        return hub.pull("smollm2-135m")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the package's sizes, so that growth is visible in every run."""
    from test_budget import size_report

    terminalreporter.write_line(f"sizes: {size_report()}")
