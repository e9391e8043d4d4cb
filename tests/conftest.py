"""What all tests share: paths to checkpoints, Hypothesis profiles, the sampling of slow tests.

A test marked `slow` runs with `--slow`; without it one slow test in ten does, always the same ones, picked by name.
Hypothesis draws new examples in every run; a run that fails ends by printing the seed that draws them again.
PyTorch gets one thread, so that timing and rounding do not depend on what else the machine does.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent
SLOW_SAMPLE = 10  # one slow test in this many runs without --slow

torch.set_num_threads(1)

# Loaded here, so that `--hypothesis-profile` still has the last word. derandomize is named since Hypothesis turns it on
# by itself where the environment says CI.
settings.register_profile(
    "ci",
    deadline=None,
    print_blob=True,
    derandomize=False,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=1000)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run every slow test, not a sample of them")
    parser.addoption("--update-golden", action="store_true", help="write golden files anew; then read their diff")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Chosen before Hypothesis reads the option, and before pytest-xdist hands the options to its workers.
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))


def in_slow_sample(nodeid: str) -> bool:
    """Whether a slow test runs without `--slow`: a property of its name alone."""
    return zlib.crc32(nodeid.encode()) % SLOW_SAMPLE == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    left_out = {item for item in items if item.get_closest_marker("slow") and not in_slow_sample(item.nodeid)}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if terminalreporter.getreports("failed") or terminalreporter.getreports("error"):
        terminalreporter.write_line(
            f"the same Hypothesis examples again: --hypothesis-seed={config.option.hypothesis_seed}"
        )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares with the file `golden/<name>` beside the test, or writes it."""

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; --update-golden writes it anew"

    return compare


@pytest.fixture(scope="session")
def examples_dir() -> Path:
    """The folder `examples/`."""
    return REPOSITORY / "examples"


@pytest.fixture(scope="session")
def stories(examples_dir: Path) -> Path:
    """The bundled target checkpoint."""
    return examples_dir / "models" / "stories"


@pytest.fixture(scope="session")
def stories_draft(examples_dir: Path) -> Path:
    """The bundled draft checkpoint: the vocabulary of `stories`."""
    return examples_dir / "models" / "stories-draft"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """A folder of further real checkpoints that may lie beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("needs further real checkpoints, in a folder shared/models beside this checkout")
    return folder
