"""bench/gpu.sh as far as a CPU can tell: the commands that it would run exist and take what they are given."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases.variants import ROADS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


def gpu_sh(*arguments, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": "python3", **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def commands(*parts, **environment) -> list[list[str]]:
    done = gpu_sh("--dry-run", *parts, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line.removeprefix("+ python3 -m ")) for line in done.stdout.splitlines()]


def test_it_runs_all_that_wants_a_gpu():
    names = [" ".join(c[:3]).removeprefix("fastgpt2.gpt2 ").split(" --")[0] for c in commands()]
    assert names == [
        "pytest -q -x",
        "verify",
        "bench ops",
        "bench train",
        "bench train",
        "bench race",
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
    assert len(ran) == len(listed) == 7
    assert [str(o.nanogpt) for o in ran if hasattr(o, "nanogpt")] == ["some/model.py"] * 4
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


@pytest.mark.parametrize("wrong", [["--dry"], ["train", "tests,verify"], ["everything"]])
def test_unknown_arguments_are_refused(wrong):
    done = gpu_sh(*wrong)
    assert done.returncode == 2 and "--dry-run" in done.stderr and "tests verify ops train compile" in done.stderr
    assert wrong[-1] in done.stderr and not done.stdout


PARTS = ("tests", "verify", "ops", "train", "compile", "race", "generate", "tune", "report")


def test_its_parts_are_the_whole_in_order():
    assert [c for part in PARTS for c in commands(part)] == commands()
    assert commands("report", "verify") == commands("report") + commands("verify")


def test_its_trainings_take_every_road_once_and_write_files_of_their_own():
    """So that a part does not replace what another measured."""
    asked = [c[c.index("--road") + 1].split(",") for part in ("train", "compile") for c in commands(part)]
    assert [road for roads in asked for road in roads] == list(ROADS) and len(asked) == 2


@pytest.fixture
def pretended(tmp_path):
    """A Python that sees a GPU and only says what it would run; `bench train` takes for ever, and ops fails."""
    file = tmp_path / "python"
    file.write_text(
        '#!/usr/bin/env bash\n'
        'case "$*" in\n'
        '-c*) ;;\n'
        '*"bench train"*) exec sleep 60 ;;\n'
        '*"bench ops"*) exit 3 ;;\n'
        'esac\n'
    )  # fmt: skip
    file.chmod(0o755)
    return dict(PYTHON=str(file), LIMIT_S="1", OUT=str(tmp_path))


def test_a_part_that_takes_too_long_is_cut_off_and_the_rest_runs(pretended):
    done = gpu_sh("train", "generate", **pretended)
    assert done.returncode == 124 and done.stderr.startswith("gpu.sh: took longer than 1 seconds")
    assert done.stderr.strip().endswith(": train") and "bench generate" in done.stdout


def test_the_race_takes_text_and_time_from_outside():
    (usual,), (asked,) = commands("race"), commands("race", RACE_S="300", DATA="some/shards")
    assert "--data" not in usual and usual[usual.index("--seconds") + 1] == "150"
    assert asked[asked.index("--data") + 1] == "some/shards" and asked[asked.index("--seconds") + 1] == "300"


def test_nothing_runs_after_what_fails(pretended):
    done = gpu_sh("verify", "ops", "generate", **pretended)
    assert done.returncode == 3 and "bench ops" in done.stdout and "bench generate" not in done.stdout


def test_it_needs_no_network():
    assert "HF_HUB_OFFLINE=1" in SCRIPT.read_text()
