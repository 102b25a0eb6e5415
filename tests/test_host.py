"""What the host does for each op, in numbers that do not depend on the machine: nobody makes it more by accident."""

import json
import os
import subprocess
import sys

import pytest

# own calls, allocations, launches of a forward and a backward
MOST = {}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("host") / "host.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt2.bench", "host", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())
