"""CUDA graphs for any training loop, with one added line.

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
    """Makes training steps of `model` replay CUDA graphs, and returns the model: `logits, loss = model(idx, targets)`
    and `loss.backward()` are then one launch each.

    model: a GPT or another module with the same call, alone, in `DistributedDataParallel` or in `torch.compile`.
    idx, targets, document_starts: a batch like those of training, on any device; only shapes matter. Give any
        document_starts if the steps use it; its length may differ from batch to batch. documents: its former name.
    segments: the number of graphs of backward, at most one a block. By default 1, and under DDP several, so that DDP
        reduces the gradients of the last blocks while those of the other blocks are computed.
    required: raise RuntimeError instead of warning.

    The first call with these shapes, in train mode and with gradients on, captures the graphs together with its
    autocast state, kernels and parameter addresses. This takes the time of several steps, and the graphs keep GPU
    memory for activations. Calls with other shapes, without targets, with a cache, in eval mode or under no_grad run
    without graphs. If something else has changed since the capture, the call also runs without graphs, with one warning
    that names the change: autocast, `model.kernels`, a module's attribute that is a number, flag or text (other
    attributes are not compared), a hook on a module, parameters that were moved or replaced. Call `graphed` again after
    such a change. If nothing can be captured, as without a CUDA device, one warning says so.

    Everything after the model works as without graphs: accumulation, any upstream gradient of the loss, clipping,
    scalers, optimizers, hooks on parameters, frozen and tied parameters, `no_sync`, new dropout in each step. A call
    whose predecessor's loss still needs its backward runs without graphs, with a warning. The logits are copies. A
    gradient through the logits, a second backward through one step and create_graph raise RuntimeError. `copy.deepcopy`
    and pickling give a model without graphs.

    Raises TypeError for a model whose forward takes no idx and targets or that is in peft's wrapper, and for idx and
    targets that are not tensors; ValueError for segments below 1.
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
    # `nn.Module.compile` uses this attribute: it is called in place of the module and is not copied with it.
    module.__dict__["_compiled_call_impl"] = Graphed(module, whole, signature, segments, required)
    return model


def release(model: nn.Module) -> None:
    """Removes the graphs of a `graphed` model and frees their memory."""
    module = _called(model)
    if isinstance(own := module._compiled_call_impl, Graphed):
        module.__dict__["_compiled_call_impl"] = own.compiled


def graphs_of(model: nn.Module) -> StepGraphs | None:
    """The graphs that a `graphed` model replays; None if none were captured."""
    own = _called(model)._compiled_call_impl
    return own.graphs if isinstance(own, Graphed) else None


class Graphed:
    """Called in place of a graphed module: replays the graphs if possible and calls the module otherwise."""

    is_transparent = True  # tells `stock.is_watched` that calling this computes what the module does

    def __init__(self, module: nn.Module, whole: nn.Module, signature: Signature, segments: int, required: bool):
        self.compiled = module._compiled_call_impl  # set by `nn.Module.compile`
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
        """Whether this call is a training step in plain eager mode, without dispatch modes and functorch transforms."""
        if self.failed or not self.whole.training or not torch.is_grad_enabled() or hardware.is_capturing():
            return False
        return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The arguments by name, or None if they differ in names, dtypes or shapes from those of the capture."""
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
        """The reason for which a replay would not compute what the module does; None if it would. Captures first, if
        there are no graphs yet."""
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
            return "the previous step still needs its backward, and a replay would overwrite its activations"
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
        """Everything that must be as it was at the capture, each under the name that a warning gives it."""
        modules = [self.whole]  # the loop adds all submodules; `nn.Module.modules` takes four times as long
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
    """PyTorch's settings, besides autocast, that determine which kernels compute a step."""
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    # torch.get_float32_matmul_precision raises if the newer setting was used.
    new = hasattr(matmul, "fp32_precision")
    tf32 = matmul.fp32_precision == "tf32" if new else torch.get_float32_matmul_precision() != "highest"
    attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    return tf32, *attention, cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()


def _called(model: nn.Module) -> nn.Module:
    """The module whose call is replayed. It is inside DDP, which does its own work around the call."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _whole(model: nn.Module) -> nn.Module:
    """The module without the wrappers of DDP and torch.compile."""
    module = _called(model)
    return getattr(module, "_orig_mod", module)


def _signature(inputs: Mapping[str, Tensor], device: torch.device) -> Signature:
    """dtype, device and shape of each input. The length of document_starts may differ from step to step."""
    return {n: (t.dtype, device, t.dim() if n == "document_starts" else tuple(t.shape)) for n, t in inputs.items()}


def _problem(model: nn.Module) -> str | None:
    """The reason for which no step of the model can be captured; None if there is none."""
    if isinstance(model, nn.DataParallel):
        return "DataParallel copies the model in each step: use DistributedDataParallel"
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1:
        return f"the model is on {', '.join(devices) or 'no device'}, allowed is one CUDA device"
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or type(p.data) is not Tensor:
            return f"parameter {name} is a {type(p).__name__}, allowed are plain nn.Parameters"
    if not step_graphs.Recorder.serves(torch.device(devices[0])):
        return f"the model is on {devices[0]}, CUDA graphs need a CUDA device"
    return None


def _say(problem: str, required: bool, stacklevel: int) -> None:
    said = f"graphed: the step runs without CUDA graphs: {problem}"
    if required:
        raise RuntimeError(said)
    warnings.warn(said, stacklevel=stacklevel)
