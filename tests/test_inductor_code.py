"""What torch.compile makes of our model on a GPU, read and run on a machine without one (inductor_code.py says how).

The graphs are those that Inductor generates code from, with our launches in them; here they are run node by node, each
launch in Triton's interpreter.
"""

import importlib
import operator
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from inductor_code import Compiled, Graph, Name, Node
from torch.fx.node import map_aggregate

from fastgpt2 import GPT

SCRIPT = Path(__file__).with_name("inductor_code.py")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    file = tmp_path_factory.mktemp("inductor") / "compiled.pickle"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, str(SCRIPT), str(file)], env=environment, check=True)
    return pickle.loads(file.read_bytes())


# --------------------------------------------------------------------------------------------------- running graphs


def function(target: str):
    if target == "getitem":
        return operator.getitem
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def run(graph: Graph, inputs: list) -> tuple:
    """The outputs of the graph for CPU tensors, with kernels interpreted."""
    known, inputs = {}, iter(inputs)

    def value(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return known[x.name] if isinstance(x, Name) else x

    for node in graph.nodes:
        args, kwargs = map_aggregate(node.args, value), map_aggregate(node.kwargs, value)
        if node.op == "placeholder":
            known[node.name] = next(inputs)
        elif node.op == "output":
            return args[0]
        elif "grid" in kwargs:
            module, name = node.target.rsplit(".", 1)
            kernel = getattr(importlib.import_module(module), name)
            kernel[kwargs["grid"][0]](**kwargs["arguments"])
        else:
            known[node.name] = function(node.target)(*args, **kwargs)
    raise AssertionError("a graph without outputs")


def step(compiled: Compiled) -> dict[str, torch.Tensor]:
    """Loss and gradients by parameter, as the compiled model computes them."""
    forward, backward = compiled.graphs
    inputs = [compiled.state[i] if isinstance(i, str) else i for i in compiled.inputs]
    loss, *saved = run(forward, inputs)
    gradients = run(backward, [*saved, torch.ones_like(loss)])
    named = {i: g for i, g in zip(compiled.inputs, gradients, strict=True) if isinstance(i, str)}
    return {"loss": loss} | named
