"""Frozen launches start what Triton starts: through Triton's real launcher, down to a driver that writes down what it
is asked for. Each example runs in a process of its own (frozen_examples.py): here kernels are interpreted.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


@functools.cache
def found(example: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "frozen_examples.py"), example]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_frozen_launch_starts_what_triton_starts():
    result = found("same_as_triton")
    assert result["wrong"] == 0
    assert result["hits"] > 100 and result["kinds"] > 30, "the example compares too little"


def test_plans_tell_numbers_and_machines_apart():
    assert found("plans_tell_numbers_apart") == dict(made=6, made_elsewhere=1)


def test_a_patched_run_sees_every_launch():
    assert found("patched_run") == dict(runs=2)


def test_who_watches_gets_tritons_own_way():
    result = found("plain_road")
    assert result["runs"].pop("nothing") == 0
    assert set(result["runs"].values()) == {3} and len(result["runs"]) == 5
    assert set(result["launches"]) == {3}


def test_counting_sees_every_launch_and_leaves_nothing_behind():
    """A hook that stayed would keep launches from being frozen."""
    expected = dict(names=["_example_kernel"] * 2, others=2, knobs_left=[0, 0], frozen=True)
    assert found("counted") == expected


def test_another_triton_launches_by_itself():
    assert found("another_triton") == dict(frozen=0, untried=True, launches=3)


def test_every_launch_of_an_operator_is_what_triton_starts():
    result = found("operators")
    assert result["wrong"] == [] and result["hits"] > 30
