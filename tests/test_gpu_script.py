"""bench/gpu.sh as far as a CPU can tell: the commands that it would run exist and take what they are given."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt2.bench import __main__ as bench

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


def gpu_sh(*arguments, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": "python3", **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def commands(**environment) -> list[list[str]]:
    done = gpu_sh("--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line.removeprefix("+ python3 -m ")) for line in done.stdout.splitlines()]


def test_it_runs_all_that_wants_a_gpu():
    names = [" ".join(c[:3]).removeprefix("fastgpt2.gpt2 ").split(" --")[0] for c in commands()]
    assert names == [
        "pytest -q -x",
        "verify",
        "bench ops",
        "bench train",
        "bench generate",
        "bench tune",
        "bench report",
    ]


def test_its_commands_take_what_they_are_given(monkeypatch):
    ran = []
    for module in bench.COMMANDS:
        monkeypatch.setattr(module, "main", lambda options: ran.append(options) or 0)
    listed = [c[2:] for c in commands(NANOGPT="some/model.py", OUT="elsewhere") if c[1:2] == ["bench"]]
    for arguments in listed:
        assert bench.main(arguments) == 0
    assert len(ran) == len(listed) == 5
    assert [str(o.nanogpt) for o in ran if hasattr(o, "nanogpt")] == ["some/model.py"] * 2
    assert {str(o.out) for o in ran if hasattr(o, "out")} == {"elsewhere"}


def test_its_tests_exist_and_hold_all_that_need_a_gpu():
    (tests,) = (c[5:] for c in commands() if c[0] == "pytest")
    assert len(tests) > 10 and all((ROOT / name).is_file() for name in tests)
    files = (ROOT / "tests").glob("test_*.py")
    marked = {f"tests/{p.name}" for p in files if "\n@pytest.mark.gpu" in p.read_text()}
    assert len(marked) >= 3 and marked <= set(tests)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = gpu_sh(PYTHON=sys.executable)
    assert done.returncode == 2 and "sees no GPU" in done.stderr and not done.stdout


def test_unknown_arguments_are_refused():
    done = gpu_sh("--dry")
    assert done.returncode == 2 and "--dry-run" in done.stderr


def test_it_needs_no_network():
    assert "HF_HUB_OFFLINE=1" in SCRIPT.read_text()
