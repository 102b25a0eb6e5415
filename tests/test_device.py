"""What is known about the machine, and who may answer for it."""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from fastgpt2.kernels import _device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), 80), ((8, 9), 89), ((10, 0), 100), ((12, 0), 120), ((9, 4), "hip")]
)
def test_architecture_is_the_compute_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(_device, "capability", lambda device: capability)
    assert _device.architecture(CPU) == expected


IMPORTS = (
    "from fastgpt2.kernels import _launch",
    "import fastgpt2.kernels._launch; _launch = fastgpt2.kernels._launch",
    "from importlib import import_module; _launch = import_module('fastgpt2.kernels._launch')",
)


@pytest.mark.parametrize("statement", IMPORTS)
@pytest.mark.parametrize("first", ["", "import fastgpt2.kernels.layer_norm"])
def test_the_former_name_is_the_same_module(statement, first):
    program = f"{first}\n{statement}\nfrom fastgpt2.kernels import _device\nassert _launch is _device"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_patched_by_the_former_name_takes_effect():
    from fastgpt2.kernels import _launch
    from fastgpt2.kernels.layer_norm import layer_norm

    asked = []
    with (
        mock.patch.object(_launch, "capability", lambda device: asked.append("capability") or (9, 0)),
        mock.patch("fastgpt2.kernels._launch.sm_count", lambda device: asked.append("sm_count") or 7),
        mock.patch.multiple(_launch, check_device=lambda *tensors: asked.append("check_device")),
    ):
        layer_norm(torch.ones(11, 8), torch.ones(8))
    assert set(asked) == {"capability", "sm_count", "check_device"}
