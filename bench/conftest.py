"""`pytest bench` runs benchmarks, which plain `pytest` disables."""

from __future__ import annotations

import pytest

from fastgpt2.bench.verify import gate
from fastgpt2.gpt2.training.train_config import find_device


@pytest.fixture(scope="session", autouse=True)
def verify_is_green() -> None:
    if not gate.verified(find_device("auto")):
        pytest.exit("fastgpt2 verify failed: nothing is measured", returncode=1)


def pytest_configure(config) -> None:
    """Runs before pytest-benchmark reads the options."""
    if config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = False
