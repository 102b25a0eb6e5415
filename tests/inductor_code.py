"""Inductor's CUDA code for our model, made on a machine without a GPU; as a script, what test_inductor_code.py reads.

python inductor_code.py FILE

The model is on the CPU while PyTorch writes its graphs down, with `_device` saying that it is an H100; they are moved
to a pretended CUDA device before Inductor compiles them. Nothing is run: in place of the wrapper that Inductor
generates stands a function that returns empty tensors of the right shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
import torch.utils._pytree as pytree
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import counters
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor

from fastgpt2 import GPT, GPTConfig
from fastgpt2.bench.audit.compiled import _Driver
from fastgpt2.kernels import _device, _op

CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
FUSED = "attention,layer_norm,mlp=fused,cross_entropy,embedding"
TINY = GPTConfig(block_size=24, vocab_size=53, n_layer=1, n_head=2, n_embd=32)


@dataclasses.dataclass
class Node:
    """A node of a graph that can be pickled: `target` by name; tensors that come from other nodes are `Name`s."""

    name: str
    op: str
    target: str
    args: tuple
    kwargs: dict


@dataclasses.dataclass(frozen=True)
class Name:
    name: str


@dataclasses.dataclass
class Graph:
    """What Inductor made of one graph, forward or backward.

    calls: what its wrapper calls, in order; numbers at the end of names are left out. nodes: what it was made of, after
    all passes over the graph. partitions: of the wrapper, each of which a CUDA graph would hold.
    """

    code: str
    calls: list[str]
    nodes: list[Node]
    output_bytes: list[int]
    partitions: int = 0
    mutated: list[str] = dataclasses.field(default_factory=list)
    skip_reasons: list[str] = dataclasses.field(default_factory=list)
    captured: bool = False


@dataclasses.dataclass
class Compiled:
    """Graphs in the order of their compilation; inputs of the first, parameters by name, others themselves."""

    graphs: list[Graph]
    inputs: list[Any]
    state: dict[str, torch.Tensor]
    skips: int

    @property
    def saved_bytes(self) -> int:
        """What forward keeps for backward: all its outputs but the loss."""
        return sum(self.graphs[0].output_bytes[1:])


# ----------------------------------------------------------------------------------------------- a pretended device


def remembered(identify: Callable) -> Callable:
    """PyTorch asks three times for each launch which tensors it writes to, and Triton's frontend takes its time."""
    known: dict[tuple, Any] = {}

    def identify_once(kernel, arguments, *rest):
        function = kernel
        while hasattr(function, "configs"):
            function = function.fn
        key = [(name, str(a.dtype) if hasattr(a, "dtype") else repr(a)) for name, a in sorted(arguments.items())]
        key = (function, *key)
        if key not in known:
            known[key] = identify(kernel, arguments, *rest)
        return known[key]

    return identify_once


@contextlib.contextmanager
def device_guard():
    """Gives CUDA the guard of the device "meta", which does nothing: a PyTorch built for CPUs has none for it."""
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextlib.contextmanager
def pretended_h100():
    """Answers what PyTorch, Triton and our kernels ask about the device."""
    answers = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_properties=lambda device=None: H100,
        get_device_capability=lambda device=None: (9, 0),
        get_device_name=lambda device=None: H100.name,
        get_rng_state=lambda *args: torch.empty(0),
        set_rng_state=lambda *args: None,
        synchronize=lambda *args: None,
        _exchange_device=lambda device: 0,
        _maybe_exchange_device=lambda device: 0,
    )
    driver = _Driver(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    properties = staticmethod(answers["get_device_properties"])
    kernels = dict(check_device=lambda *t: None, capability=lambda device: (9, 0), sm_count=lambda device: 132)
    try:
        with (
            device_guard(),
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch.object(CudaInterface, "get_device_properties", properties),
            mock.patch.object(CudaInterface.Worker, "get_device_properties", properties),
            mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            mock.patch.object(torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True, create=True),
            mock.patch.multiple(_device, **kernels),
        ):
            yield
    finally:
        vars(triton.runtime.driver).update(before)


IDENTIFY = remembered(triton_kernel_wrap.identify_accessed_tensors)


def move(x: Any) -> Any:
    if isinstance(x, FakeTensor):
        x.fake_device = CUDA
    return CUDA if isinstance(x, torch.device) else x


def move_graph(module: torch.fx.GraphModule, inputs) -> None:
    pytree.tree_map(move, list(inputs))
    for node in module.graph.nodes:
        pytree.tree_map(move, node.meta.get("val"))
        node.args = torch.fx.node.map_aggregate(node.args, move)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, move)


# ------------------------------------------------------------------------------------------------- what comes out


def called(code: str) -> list[str]:
    """What a wrapper calls that launches or computes: kernels by name, `extern_kernels.mm`, `torch.ops.aten.sort`."""
    body = code[re.search(r"def (call|partition_0)\(", code).start() : code.index("\ndef get_args")]
    found = re.findall(r"(\w+)\.run\(|(extern_kernels\.\w+)\(|(torch\.ops\.\w+\.\w+)\.\w+\(", body)
    return [re.sub(r"_\d+$", "", kernel) or extern or operator for kernel, extern, operator in found]


def plain(x: Any) -> Any:
    return torch.fx.node.map_aggregate(x, lambda a: Name(a.name) if isinstance(a, torch.fx.Node) else a)


def nodes(module: torch.fx.GraphModule) -> list[Node]:
    found = []
    for node in module.graph.nodes:
        kwargs, target = dict(node.kwargs), str(node.target)
        if "kernel_idx" in kwargs:
            kernel = kernel_side_table.get_kernel(kwargs["kernel_idx"])
            while hasattr(kernel, "configs"):  # an autotuner of one choice, which holds the number of warps
                kernel = kernel.fn
            arguments = (
                triton_kernel_wrap.kernel_side_table.get_constant_args(kwargs["constant_args_idx"]) | kwargs["kwargs"]
            )
            target = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
            kwargs = dict(grid=kwargs["grid"], arguments=arguments)
        elif node.op == "get_attr":
            kwargs = dict(nodes=nodes(getattr(module, node.target)))
        elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
            target = node.target.__name__
        found.append(Node(node.name, node.op, target, plain(node.args), plain(kwargs)))
    return found


def compile_model(
    model: torch.nn.Module, *batch, mode: str | None = None, patches: dict | None = None, **options
) -> Compiled:
    """Compiles a training step of `model`; `options` are those of torch.compile."""
    graphs: list[Graph] = []
    first_inputs: list[Any] = []

    def generate(self: GraphLowering) -> SimpleNamespace:
        code, _ = self.codegen()
        code = getattr(code, "value", code)
        outputs = pytree.tree_leaves(next(n for n in self.module.graph.nodes if n.op == "output").args[0])
        values = [o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in outputs]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        sizes = [int(v.untyped_storage().nbytes()) for v in tensors]
        graphs.append(Graph(code, called(code), nodes(self.module), sizes, len(re.findall(r"def partition_\d", code))))

        def call(args: list) -> tuple:
            if not first_inputs:
                first_inputs.extend(args)
            args.clear()
            return tuple(
                torch.empty_strided([int(s) for s in v.shape], [int(s) for s in v.stride()], dtype=v.dtype)
                if isinstance(v, torch.Tensor)
                else v
                for v in values
            )

        def wrap(functions: list) -> None:
            for function in functions:
                function(call)

        runner = SimpleNamespace(partitions=[call] * graphs[-1].partitions, recursively_apply_fns=wrap)
        return SimpleNamespace(call=call, runner=runner, __file__="/dev/null", key="key")

    def inner(module: torch.fx.GraphModule, inputs, **kwargs):
        move_graph(module, inputs)
        compiled = compile_fx.compile_fx_inner(module, inputs, **kwargs)
        info = compiled.cudagraph_info
        reasons = [compiled.disabled_cudagraphs_reason, *(info.cudagraph_fail_reasons if info else ())]
        graphs[-1].skip_reasons = [r for r in reasons if r]
        graphs[-1].mutated = sorted(compiled.mutated_inputs)
        return compiled

    def capture(model, *args, **kwargs):
        graphs[-1].captured = True
        return model

    def backend(module: torch.fx.GraphModule, inputs):
        settings = torch._inductor.list_mode_options(mode) if mode else {}
        return compile_fx.compile_fx(module, inputs, inner_compile=inner, config_patches=settings | (patches or {}))

    torch._dynamo.reset()
    skips = counters["inductor"]["cudagraph_skips"]
    with (
        pretended_h100(),
        mock.patch.object(GraphLowering, "compile_to_module", generate),
        mock.patch.object(compile_fx, "cudagraphify", capture),
        mock.patch.object(triton_kernel_wrap, "identify_accessed_tensors", IDENTIFY),
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch.compile(model, fullgraph=True, backend=backend, **options)(*batch)[1].backward()
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    inputs = [names.get(t.data_ptr(), t) if isinstance(t, torch.Tensor) else t for t in first_inputs]
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Compiled(graphs, inputs, state, counters["inductor"]["cudagraph_skips"] - skips)


def tiny(kernels: str = "triton", **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes), kernels=kernels)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model


def tokens(B: int = 2, T: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(TINY.vocab_size, (2, B, T), generator=torch.Generator().manual_seed(1)))


class Counting(torch.nn.Module):
    """What a CUDA graph may not hold as it is: it writes to a tensor that it is given."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, idx, targets):
        self.steps += 1
        return None, (idx.float() * self.scale).sum()


def opaque():
    """Inside, torch.compile calls every operator, as it does those that were registered as opaque."""
    return mock.patch.object(_op, "_visible", lambda: False)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fastgpt2" in str(node.target) or "triton" in str(node.target)]


def exported() -> list[str]:
    """Operators of the exported model, its products and sums decomposed."""
    with pretended_h100():
        return operators(torch.export.export(tiny().eval(), (tokens()[0],)).run_decompositions().graph)


def refusal() -> str:
    """What a compiled model says on a CPU."""
    torch._dynamo.reset()
    try:
        torch.compile(tiny(), backend="aot_eager")(*tokens())
    except RuntimeError as error:
        return str(error)
    return ""


def toggled() -> list[bool]:
    """Whether each graph of one compiled model, switched between PyTorch and Triton and back, holds launches."""
    seen = []

    def compile_nothing(module, inputs):
        seen.append(any("triton_kernel_wrapper" in str(node.target) for node in module.graph.nodes))
        return module

    model = tiny("torch").eval()
    torch._dynamo.reset()
    with pretended_h100(), torch.no_grad(), mock.patch.object(triton.JITFunction, "run"):
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compile_nothing), fullgraph=True)
        for kernels in ("torch", "triton", "torch", "triton"):
            model.kernels = kernels
            compiled(tokens()[0])
    return seen


def main(file: str) -> None:
    batch = tokens()
    whole = dict(graph_partition=False)  # Inductor says why it would skip a graph, where else it would cut it
    untimed = dict(max_autotune_gemm_backends="ATEN")  # with more to choose from it would measure
    found = {
        "one layer": compile_model(tiny(), *batch),
        "two layers": compile_model(tiny(n_layer=2), *batch),
        "dropout": compile_model(tiny(dropout=0.2), *batch, patches=dict(fallback_random=True)),
        "dynamic": compile_model(tiny(), *batch, dynamic=True),
        "reduce-overhead": compile_model(tiny(dropout=0.2), *batch, mode="reduce-overhead", patches=whole),
        "max-autotune": compile_model(tiny(), *batch, mode="max-autotune", patches=untimed),
        "counting": compile_model(Counting(), *batch, mode="reduce-overhead", patches=whole),
    }
    with bfloat16():
        found["bfloat16"] = compile_model(tiny(), *batch)
        found["fused"] = compile_model(tiny(FUSED), *batch)
        with opaque():
            found["opaque"] = compile_model(tiny(), *batch)
    others = dict(exported=exported(), refusal=refusal(), toggled=toggled())
    with open(file, "wb") as out:
        pickle.dump(found | others, out)


if __name__ == "__main__":
    import inductor_code  # so that what is pickled is known by its module's name

    inductor_code.main(sys.argv[1])
