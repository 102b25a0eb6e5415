"""What the host does for each op, in numbers that do not depend on the machine: nobody makes it more by accident."""

import json
import os
import subprocess
import sys

import pytest

from fastgpt2.bench.__main__ import main as bench
from fastgpt2.bench.audit import audit

# Own calls, allocations and launches of a forward and a backward. Lower them where they got better.
MOST = {
    "fp32": {
        "add_layer_norm": (114, 9, 3),
        "attention": (76, 4, 3),
        "mlp": (116, 10, 3),
        "embedding": (91, 8, 3),
        "loss": (131, 9, 4),
        "block": (470, 38, 13),
        "model": (5984, 487, 166),
    },
    "autocast, bf16": {
        "mlp": (126, 16, 3),
        "loss": (130, 13, 4),
        "block": (548, 49, 13),
        "model": (6921, 622, 166),
    },
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("host") / "host.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt2.bench", "host", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize(("cast", "thing"), [(cast, thing) for cast, things in MOST.items() for thing in things])
def test_our_road_takes_no_more_than_it_did(counted, cast, thing):
    found = counted[cast][thing]["ours"]
    most = dict(zip(("own_calls", "allocations", "launches"), MOST[cast][thing], strict=True))
    assert {name: found[name] for name in most if found[name] > most[name]} == {}, f"allowed are {most}"


def test_every_road_is_there_with_what_it_takes(counted):
    for found in counted.values():
        assert set(found["model"]) == {"ours", "ours, SDPA", "HuggingFace"}
        assert all(taken["forward_us"] > 0 and taken["calls"] > 0 for taken in found["model"].values())
        assert all(by_road["ours, SDPA"]["launches"] == 0 for by_road in found.values())
        assert found["block"]["ours"]["allocations"] < found["block"]["ours, SDPA"]["allocations"]


def test_rounds_have_to_be_positive():
    with pytest.raises(ValueError, match="--rounds is 0"):
        bench(["host", "--rounds", "0"])


def test_the_kernel_card_holds_the_hosts_figures():
    assert audit.HOST.read_text() in audit.CARD.with_suffix(".md").read_text()
