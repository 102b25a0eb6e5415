"""What torch.compile makes of our model on a GPU, read and run on a machine without one (inductor_code.py says how).

The graphs are those that Inductor generates code from, with our launches in them; here they are run node by node, each
launch in Triton's interpreter.
"""

import builtins
import importlib
import operator
import os
import pickle
import re
import subprocess
import symtable
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from inductor_code import FUSED, Compiled, Name, Node, bfloat16, tiny, tokens
from torch.fx.node import map_aggregate

SCRIPT = Path(__file__).with_name("inductor_code.py")
UNINTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def compiled(made_once) -> dict[str, Compiled]:
    def make(file: Path) -> None:
        subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT), str(file)], env=UNINTERPRETED, check=True)

    return pickle.loads(made_once("inductor.pickle", make).read_bytes())


def ours(calls: list[str]) -> Counter:
    """Launches of our kernels, by name without its ends."""
    return Counter(c.removeprefix("_").removesuffix("_kernel") for c in calls if c.startswith("_"))


def products(calls: list[str]) -> int:
    return sum(c.startswith("extern_kernels.") for c in calls)


def inductors(calls: list[str]) -> list[str]:
    """Kernels that Inductor wrote: what is left of the model beside ours, and copies if it has to make some."""
    return [c for c in calls if c.startswith("triton_")]


def operators(calls: list[str]) -> list[str]:
    return [c for c in calls if c.startswith("torch.ops.")]


# ---------------------------------------------------------------------------------------------- the generated code


def test_no_python_of_ours_runs_between_launches(compiled):
    for case in ("one layer", "two layers", "dynamic", "reduce-overhead", "max-autotune", "bfloat16"):
        forward, backward = (operators(graph.calls) for graph in compiled[case].graphs)
        assert forward == ["torch.ops.fastgpt2.linear_cross_entropy_fwd"], case
        assert not [o for o in backward if "fastgpt2" in o], case
    assert len(operators(compiled["opaque"].graphs[0].calls)) == 7, "the harness sees operators where there are some"


def test_a_block_is_its_launches_and_products(compiled):
    """What two layers have more than one: no kernel of Inductor's own, and no copies."""
    one, two = (compiled[case].graphs for case in ("one layer", "two layers"))
    forward, backward = (list((Counter(b.calls) - Counter(a.calls)).elements()) for a, b in zip(one, two, strict=True))
    assert ours(forward) == dict(layer_norm_fwd=2, attention_fwd=1, gelu_fwd=1)
    assert products(forward) == 4 and len(forward) == 8
    assert ours(backward) == dict(
        layer_norm_bwd=2, column_sum=4, attention_delta=1, attention_bwd=1, gelu_bwd=1
    )  # fmt: skip
    assert products(backward) == 8 and len(backward) == 17
    assert inductors(backward) == []


def test_a_fused_mlp_has_one_product_and_one_pass_less_each_way(compiled):
    apart, fused = (compiled[case].graphs for case in ("bfloat16", "fused"))
    for before, after, gone in zip(apart, fused, ("gelu_fwd", "gelu_bwd"), strict=True):
        assert ours(after.calls) == ours(before.calls) - Counter([gone]) + Counter(["gelu_product"])
        assert products(after.calls) == products(before.calls) - 1
        assert sorted(inductors(after.calls)) == sorted(inductors(before.calls)), "no copies"
        assert "DESCRIPTORS" in after.code and re.search(r"'DESCRIPTORS': True|DESCRIPTORS *= *True", after.code)


def test_what_stands_before_and_after_the_blocks(compiled):
    forward, backward = (graph.calls for graph in compiled["one layer"].graphs)
    assert ours(forward)["embedding_fwd"] == 1 and ours(forward)["layer_norm_fwd"] == 3
    assert all("assert_async" in kernel for kernel in inductors(forward)), "tokens are checked, and nothing else"
    assert [ours(backward)[k] for k in ("batch_sum", "segment_sum", "merge_pieces", "scale_gradients")] == [1] * 4
    assert len(inductors(backward)) <= 4  # sort, zeros, residual sum, tied table's sum


def undefined(source: str) -> set[str]:
    """Names that functions of a module use and nobody defines."""

    def scopes(table):
        yield table
        for child in table.get_children():
            yield from scopes(child)

    top = symtable.symtable(source, "kernel", "exec")
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used = {symbol.get_name() for scope in scopes(top) for symbol in scope.get_symbols() if symbol.is_global()}
    return used - known - set(dir(builtins)) - {"__file__"}


def test_copied_kernels_have_what_they_call(compiled):
    """Inductor copies a kernel's source, and by their names the functions and constants that it uses."""
    assert undefined("def f():\n    return missing(min(1, 2))") == {"missing"}
    sources = [
        source
        for case in ("one layer", "dropout")
        for graph in compiled[case].graphs
        for source in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", graph.code, flags=re.DOTALL)
    ]
    assert len(sources) > 20
    for source in sources:
        assert not undefined(source)


def test_forward_keeps_no_more_for_backward(compiled):
    assert 0 < compiled["bfloat16"].saved_bytes <= compiled["opaque"].saved_bytes


# ------------------------------------------------------------------------------------------- without the interpreter


def test_an_exported_program_keeps_operators(compiled):
    assert {name.split(".")[1] for name in compiled["exported"]} == {
        *("token_position_embedding_fwd", "layer_norm_fwd", "causal_attention_fwd", "mlp_fwd")
    }


def test_compiled_on_a_cpu_says_what_to_do(compiled):
    assert re.search(
        r"RuntimeError: token_position_embedding_fwd: .* on 'cpu': use kernels='torch'", compiled["refusal"]
    )
    assert "embedding='torch'" in compiled["refusal"]


def test_toggling_compiles_once_and_takes_the_other_path(compiled):
    assert compiled["toggled"] == [False, True]


def test_compiled_code_on_disk_is_of_these_sources(tmp_path):
    """An operator's outputs may have changed where the graph that calls it has not."""
    code = """
import torch
from torch._dynamo.utils import counters
from fastgpt2.kernels import _op
from fastgpt2.kernels.layer_norm import layer_norm

def taken_from_disk():
    torch._dynamo.reset()
    counters.clear()
    torch.compile(layer_norm)(torch.ones(4, 8, requires_grad=True), torch.ones(8)).sum().backward()
    return bool(counters["inductor"]["fxgraph_cache_hit"] or counters["aot_autograd"]["autograd_cache_hit"])

print(taken_from_disk(), taken_from_disk())
tag = torch.compiler.config.cache_key_tag
with torch.compiler.config.patch(cache_key_tag=tag.replace(_op.SOURCES, "of another version")):
    print(taken_from_disk())
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\nFalse\n"


# --------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("case", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_hold_a_training_step_whole(compiled, case):
    found = compiled[case]
    assert found.skips == 0
    for graph in found.graphs:
        assert graph.captured and graph.skip_reasons == [] and graph.mutated == []


def test_nothing_is_cut_out_of_a_cuda_graph(compiled):
    """By default, newer Inductors cut out of a graph what it cannot hold, instead of skipping the whole."""
    assert [graph.partitions for graph in compiled["max-autotune"].graphs] in ([1, 1], [0, 0])


def test_what_a_cuda_graph_may_not_hold_is_seen(compiled):
    assert compiled["counting"].graphs[0].mutated
    assert not compiled["one layer"].graphs[0].captured, "not asked for"


# --------------------------------------------------------------------------------------------------- running graphs


def function(target: str):
    if target == "getitem":
        return operator.getitem
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def run(nodes: list[Node], inputs: list):
    """What a graph of these nodes returns for CPU tensors, with kernels interpreted."""
    known, inputs = {}, iter(inputs)

    def value(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return known[x.name] if isinstance(x, Name) else x

    for node in nodes:
        args, kwargs = map_aggregate(node.args, value), map_aggregate(node.kwargs, value)
        if node.op == "placeholder":
            known[node.name] = next(inputs)
        elif node.op == "output":
            return args[0]
        elif node.op == "get_attr":
            known[node.name] = node.kwargs["nodes"]
        elif node.target == "control_deps":  # a graph that waits for others
            _, graph, *rest = args
            known[node.name] = run(graph, rest)
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
    loss, *saved = run(forward.nodes, inputs)
    gradients = run(backward.nodes, [*saved, torch.ones_like(loss)])
    named = {i: g for i, g in zip(compiled.inputs, gradients, strict=True) if isinstance(i, str)}
    return {"loss": loss} | named


def eager(model, *batch) -> dict[str, torch.Tensor]:
    loss = model(*batch)[1]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case, changes", [("one layer", {}), ("two layers", dict(n_layer=2))])
def test_compiled_is_eager(compiled, case, changes):
    torch.testing.assert_close(step(compiled[case]), eager(tiny(**changes), *tokens()), rtol=1e-6, atol=1e-6)


def test_compiled_is_eager_with_dropout(compiled):
    """Seeds are drawn in the same order from the same generator, and backward has those of forward."""
    torch.manual_seed(3)
    found = step(compiled["dropout"])
    model = tiny(dropout=0.2)
    torch.manual_seed(3)
    torch.testing.assert_close(found, eager(model, *tokens()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case, kernels", [("bfloat16", "triton"), ("fused", FUSED)])
def test_compiled_is_eager_in_bfloat16(case, kernels, compiled):
    with bfloat16():
        truth = eager(tiny(kernels), *tokens())
    for name, gradient in step(compiled[case]).items():
        assert (gradient - truth[name]).norm() <= 0.02 * truth[name].norm(), name
