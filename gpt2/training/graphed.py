"""One line that gives a training loop of one's own the speed of CUDA graphs.

    graphed(model, idx, targets)                    # once, before the loop, after wrapping in DDP or torch.compile
    with torch.autocast("cuda", torch.bfloat16):
        logits, loss = model(idx, targets)          # the first such step captures, the next ones replay
    loss.backward()

It pays where Python takes longer to launch a step's kernels than the GPU takes to run them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.inputs import renamed_documents
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.stock import has_hooks
from fastgpt2.gpt2.training import step_graphs
from fastgpt2.gpt2.training.step_graphs import StepGraphs

Model = TypeVar("Model", bound=nn.Module)
Signature = dict[str, tuple[Any, ...]]
NAMES = ("idx", "targets", "document_starts")
FORMER_NAMES = {"documents": "document_starts"}  # of an argument of `GPT.forward`, accepted until the next release
SETTINGS = frozenset((bool, int, float, str))  # types of the modules' attributes that are compared between steps
SEGMENTS = 6  # of backward under DDP: each costs a launch and lets DDP reduce its gradients during the next segment


def graphed(
    model: Model,
    idx: Tensor,
    targets: Tensor,
    document_starts: Tensor | None = None,
    *,
    segments: int | None = None,
    required: bool = False,
    documents: Tensor | None = None,
) -> Model:
    """Makes training steps of `model` replay CUDA graphs, and returns it: `logits, loss = model(idx, targets)` and
    `loss.backward()` are then two launches.

    model: a GPT or another module of its contract, alone, in `DistributedDataParallel` or in `torch.compile`.
    idx, targets, documents: a batch like those of training, on any device; only its shapes count. documents: any, if
        the steps have some; each batch may have its own number of them.
    segments: graphs that backward consists of, at most one a block; by default 1, and under DDP several, so that it
        reduces the gradients of the last blocks while the others are computed.
    required: raise RuntimeError where this would warn.

    The first call of these shapes, in train mode and with gradients on, captures: its autocast state, kernels and the
    parameters' memory. It takes the time of some steps, and GPU memory for activations that stays taken. Calls of other
    shapes, without targets, with a cache, in eval mode or under no_grad run as before. So does, with one warning that
    says why, each call in which something else is not what it was: autocast, `model.kernels`, a number, flag or text
    that a module has as an attribute (what else hangs on one is not looked at), a hook on one, parameters that moved or
    were replaced. After such a change call `graphed` again. Where nothing can be captured, as without a CUDA device,
    one warning says so and the model works as before.

    Everything that follows the model is as before: accumulation, any upstream gradient of the loss, clipping, scalers,
    optimizers, hooks on parameters, frozen and tied parameters, `no_sync`, fresh dropout in each step. While an earlier
    loss still waits for its backward, a call runs as before, with a warning. The logits are copies. An error refuses a
    gradient through them, a second backward through one step, and create_graph. `copy.deepcopy` and pickling give a
    model without graphs.

    Raises TypeError for a model that takes no idx and targets or is in peft's wrapper, and for idx and targets that
    are no tensors, ValueError for segments below 1.
    """
    if segments is not None and segments < 1:
        raise ValueError(f"segments is {segments}, allowed are whole numbers of at least 1")
    document_starts = renamed_documents(document_starts, documents)
    module, whole = _called(model), _whole(model)
    if hasattr(whole, "get_base_model"):  # peft's wrapper calls the model's forward directly, past the graphs
        raise TypeError(f"model is a {type(whole).__name__}: give its get_base_model(), and call that in the loop")
    taken = inspect.signature(whole.forward).parameters
    missing = [name for name in NAMES[:2] if name not in taken]
    if missing and not isinstance(model, nn.DataParallel):
        raise TypeError(f"model is a {type(whole).__name__}, whose forward takes no {missing[0]}")
    for name, tensor in zip(NAMES[:2], (idx, targets), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor (B, T) of int64 tokens")
    release(model)
    if problem := _problem(model):
        _say(problem, required, stacklevel=3)
        return model
    device = next(model.parameters()).device
    given = dict(zip(NAMES, (idx, targets, document_starts), strict=True))
    signature = _signature({name: t for name, t in given.items() if t is not None}, device)
    if segments is None:
        segments = SEGMENTS if isinstance(model, nn.parallel.DistributedDataParallel) else 1
    # Where Module.compile puts compiled code: called in place of the module, and no part of its copies.
    module.__dict__["_compiled_call_impl"] = Graphed(module, whole, signature, segments, required)
    return model


def release(model: nn.Module) -> None:
    """Takes the graphs of a `graphed` model away, and their memory with them."""
    module = _called(model)
    if isinstance(own := module._compiled_call_impl, Graphed):
        module.__dict__["_compiled_call_impl"] = own.compiled


def graphs_of(model: nn.Module) -> StepGraphs | None:
    """The graphs that a `graphed` model replays; None where it has captured none."""
    own = _called(model)._compiled_call_impl
    return own.graphs if isinstance(own, Graphed) else None


class Graphed:
    """What is called in place of a graphed module: replays where it may, and calls the module where not."""

    is_transparent = True  # for `stock.is_watched`: what is called is the module

    def __init__(self, module: nn.Module, whole: nn.Module, signature: Signature, segments: int, required: bool):
        self.compiled = module._compiled_call_impl  # of Module.compile
        self.plain = module._call_impl if self.compiled is None else self.compiled
        self.whole, self.signature, self.segments, self.required = whole, signature, segments, required
        self.is_compiled = self.compiled is not None or module is not whole
        self.names = list(inspect.signature(whole.forward).parameters)
        self.graphs: StepGraphs | None = None
        self.failed = False
        self.said: set[str] = set()
        self.state: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self._is_step() and (inputs := self._inputs(args, kwargs)):
            if (problem := self._why_not(inputs)) is None:
                assert self.graphs is not None
                return self.graphs(**self._padded(inputs))
            self._say(problem)
        return self.plain(*args, **kwargs)

    def _is_step(self) -> bool:
        """Whether this is a step of training that only PyTorch's own eager mode looks at."""
        if self.failed or not self.whole.training or not torch.is_grad_enabled() or hardware.is_capturing():
            return False
        return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The arguments by name, if they are like those of the capture."""
        given = {name: value for name, value in (*zip(self.names, args, strict=False), *kwargs.items())}
        given = {FORMER_NAMES.get(name, name): value for name, value in given.items() if value is not None}
        if len(args) > len(self.names) or given.keys() != self.signature.keys():
            return None
        if not all(isinstance(value, Tensor) for value in given.values()):
            return None
        first = next(self.whole.parameters()).device
        same = all(t.device == first for t in given.values()) and _signature(given, first) == self.signature
        fits = given.get("document_starts", given["idx"]).numel() <= given["idx"].numel() + 1
        return given if same and fits else None

    def _why_not(self, inputs: Mapping[str, Tensor]) -> str | None:
        """Captures if that is still to be done -> None if a replay computes what the module would, or why not."""
        state = self._state()
        if any(has_hooks(m) for m in state["its modules"]):
            return "a module has a hook, which a replay does not call"
        if self.graphs is None:
            try:
                self._capture(inputs)
            except RuntimeError as error:
                self.failed = True
                return f"nothing was captured: {error}"
            self.state = state
        assert self.graphs is not None
        for what, now in state.items():
            if now != self.state[what]:
                return f"{what} changed after the capture: call graphed again"
        if self.graphs.busy:
            return "the backward of the step before is still to come, whose activations a replay would overwrite"
        return None

    def _capture(self, inputs: Mapping[str, Tensor]) -> None:
        whole = self.whole
        recomputes = isinstance(whole, GPT) and whole.transformer.recompute
        cuts: list[nn.Module] = []
        if isinstance(whole, GPT) and not recomputes and not self.is_compiled:
            blocks, count = list(whole.transformer.h), min(self.segments, len(whole.transformer.h))
            cuts = [blocks[i * len(blocks) // count] for i in range(1, count)]
        self.graphs = StepGraphs(self.plain, whole, self._padded(inputs), cuts, redraws=recomputes)

    def _padded(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, with document_starts filled up to one entry a token by repeating the last one, so that its length
        is the same in every step."""
        found = dict(inputs)
        if (starts := found.get("document_starts")) is not None:
            rest = found["idx"].numel() + 1 - starts.numel()
            found["document_starts"] = torch.cat([starts, starts[-1:].expand(rest)])
        return found

    def _state(self) -> dict[str, Any]:
        """All that a graph keeps as it was at the capture, by what to call it in a warning."""
        modules = [self.whole]  # and by the loop all below it; `Module.modules` takes four times as long
        for m in modules:
            modules += [child for child in m._modules.values() if child is not None]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        kind = next(self.whole.parameters()).device.type
        autocast = torch.is_autocast_enabled(kind)
        return {
            "its modules": modules,
            "its parameters": [(id(t), t.data_ptr(), t.requires_grad) for t in tensors],
            "model.kernels": getattr(self.whole, "kernels", None),
            "a module's settings": [
                (
                    type(m),
                    m.__dict__.get("forward"),
                    [v for k, v in m.__dict__.items() if type(v) in SETTINGS and k[0] != "_"],
                )
                for m in modules
            ],
            "autocast": autocast and torch.get_autocast_dtype(kind),
            "PyTorch's settings": _settings(),
        }

    def _say(self, problem: str) -> None:
        if problem not in self.said:
            self.said.add(problem)
            _say(problem, self.required, stacklevel=5)


def _settings() -> tuple[Any, ...]:
    """What decides in PyTorch, beside autocast, which kernels compute a step."""
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    # torch.get_float32_matmul_precision raises where somebody has set the newer of the two.
    new = hasattr(matmul, "fp32_precision")
    tf32 = matmul.fp32_precision == "tf32" if new else torch.get_float32_matmul_precision() != "highest"
    attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    return tf32, *attention, cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()


def _called(model: nn.Module) -> nn.Module:
    """The module whose call is replayed: inside DDP, which does its own work around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _whole(model: nn.Module) -> nn.Module:
    """The module itself, inside DDP and torch.compile."""
    module = _called(model)
    return getattr(module, "_orig_mod", module)


def _signature(inputs: Mapping[str, Tensor], device: torch.device) -> Signature:
    """dtype, device and shape of each input. The length of document_starts may differ from step to step."""
    return {n: (t.dtype, device, t.dim() if n == "document_starts" else tuple(t.shape)) for n, t in inputs.items()}


def _problem(model: nn.Module) -> str | None:
    """Why no step of the model can be captured, whatever comes."""
    if isinstance(model, nn.DataParallel):
        return "DataParallel copies the model in each step: use DistributedDataParallel"
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1:
        return f"the model is on {', '.join(devices) or 'no device'}, allowed is one CUDA device"
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or type(p.data) is not Tensor:
            return f"parameter {name} is a {type(p).__name__}, allowed are PyTorch's plain ones"
    if not step_graphs.Recorder.serves(torch.device(devices[0])):
        return f"the model is on {devices[0]}, CUDA graphs need a CUDA device"
    return None


def _say(problem: str, required: bool, stacklevel: int) -> None:
    said = f"graphed: the step runs without CUDA graphs, as before: {problem}"
    if required:
        raise RuntimeError(said)
    warnings.warn(said, stacklevel=stacklevel)
