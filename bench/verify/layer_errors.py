"""Every op in every layer of one model, on what reaches it there from a batch, against eager PyTorch and float64.

    for call in recorded_calls(model, x, targets):
        rows = list(call_errors(call, torch.float16))

A float32 pass of the model, forward and backward, is recorded: what each op of gpt2/ops.py is given, and the gradient
that comes back to it. Then each op runs by itself on that, rounded to the dtype, by its switch and by eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.bench.verify.error_rule import Row, compare, mean_size, root_mean_square, token_losses, worst
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels, Stream

if TYPE_CHECKING:
    from rich.table import Table

# Functions of gpt2/ops.py: their name in the tables, their switch, and what they return ("": nothing to compare).
OPS = {
    "embedding": ("embedding", "embedding", ("output",)),
    "add_layer_norm": ("add_layer_norm", "layer_norm", ("sum", "output")),
    "causal_attention": ("attention", "attention", ("output",)),
    "mlp": ("mlp", "mlp", ("output", "")),
    "head_loss": ("loss", "cross_entropy", ("", "loss")),
}


@dataclass
class Call:
    """One op in one layer. arguments: those of the function, in float32. upstream: gradients of its outputs, by the
    names of `OPS`; whoever has none is read by nobody."""

    function: str
    place: str
    arguments: dict[str, Any]
    upstream: dict[str, Tensor] = field(default_factory=dict)


def recorded_calls(model: GPT, x: Tensor, targets: Tensor) -> list[Call]:
    """What a training step gives each op. model: left as it was. x, targets (B, T)."""
    model = copy.deepcopy(model).float().train()
    names = {module: name.removeprefix("transformer.") for name, module in model.named_modules()}
    calls: list[Call] = []

    def recorder(function: str, original: Callable) -> Callable:
        signature = inspect.signature(original)

        def record(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            place = _place(bound.arguments, names) or f"h.{sum(c.function == function for c in calls)}.attn"
            call = Call(function, place, dict(bound.arguments))
            calls.append(call)
            kernels = ALL_TORCH if function == "add_layer_norm" else bound.arguments["kernels"]
            outputs = original(**{**bound.arguments, "kernels": kernels})
            for name, output in _outputs(call, outputs).items():
                if output.requires_grad:
                    output.register_hook(functools.partial(call.upstream.__setitem__, name))
            return outputs

        return record

    # A bias that ends a branch is left to the kernel of the LayerNorm that follows: recorded as that switch has it.
    with contextlib.ExitStack() as stack:
        for function in OPS:
            stack.enter_context(mock.patch.object(ops, function, recorder(function, getattr(ops, function))))
        with model.use_kernels(Kernels(layer_norm="triton")):
            model(x, targets)[1].backward()
    return calls


def call_errors(call: Call, dtype: torch.dtype) -> Iterator[Row]:
    """Outputs and the gradient of everything that is not an integer, in one dtype.

    Gradients that come in are those of the loss, scaled to a root mean square of 1, so that float16 holds them.
    """
    subject, switch, _ = OPS[call.function]
    given = _mapped(call.arguments, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    truth = _results(call, _mapped(given, _widened), ALL_TORCH)
    eager, ours = (_results(call, given, kernels) for kernels in (ALL_TORCH, Kernels.parse(switch)))
    expected = 0.0
    if call.function == "head_loss":  # a mean of losses, in which errors cancel by luck
        exact, rounded = (_token_losses(arguments) for arguments in (_mapped(given, _widened), given))
        expected = mean_size(rounded - exact) / mean_size(exact)
    for name, t in truth.items():
        allowed = expected if name == "loss" else 0.0
        row = compare(subject, switch, name, ours[name], eager[name], None, t, expected=allowed)
        yield dataclasses.replace(row, place=call.place)


def _results(call: Call, arguments: Mapping[str, Any], kernels: Kernels) -> dict[str, Tensor]:
    """Outputs by the names of `OPS`, and gradients as "d NAME"."""
    leaves: dict[str, Tensor] = {}
    own = {name: _leaves(name, value, leaves) for name, value in arguments.items()}
    outputs = _outputs(call, getattr(ops, call.function)(**{**own, "kernels": kernels}))
    used = [name for name in outputs if name in call.upstream]
    scaled = [_scaled(call.upstream[name]).to(outputs[name].dtype) for name in used]
    torch.autograd.backward([outputs[name] for name in used], scaled)
    gradients = {f"d {name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return {**{name: output.detach() for name, output in outputs.items()}, **gradients}


def _scaled(gradient: Tensor) -> Tensor:
    return gradient.double() / (root_mean_square(gradient) or 1.0)


def _outputs(call: Call, outputs: Any) -> dict[str, Tensor]:
    """By name; a stream that `add_layer_norm` hands on as it came is nothing that it computed."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    handed_on = call.function == "add_layer_norm" and call.arguments["stream"].residual is None
    return {
        name: output
        for name, output in zip(OPS[call.function][2], outputs, strict=True)
        if name and not (handed_on and name == "sum")
    }


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy in which `change` was applied to each tensor, also those of streams, dictionaries and modules."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, nn.Module):
        value = copy.deepcopy(value)
        for name, parameter in list(value.named_parameters()):
            setattr(value, name, nn.Parameter(change(parameter.detach())))
        return value
    if isinstance(value, Stream):
        return Stream(*(_mapped(part, change) for part in value))
    return {name: _mapped(part, change) for name, part in value.items()} if isinstance(value, dict) else value


def _widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _leaves(name: str, value: Any, leaves: dict[str, Tensor]) -> Any:
    """A copy whose floating tensors take gradients; they are put into `leaves` by name."""
    if isinstance(value, Tensor):
        value = value.detach().clone().requires_grad_(value.is_floating_point())
        leaves |= {name: value} if value.requires_grad else {}
    elif isinstance(value, nn.Module):
        value = copy.deepcopy(value)
        leaves |= {f"{name} {parameter}": p for parameter, p in value.named_parameters()}
    elif isinstance(value, Stream):
        return Stream(*(_leaves(part, t, leaves) for part, t in value._asdict().items()))
    return value


def _token_losses(arguments: Mapping[str, Any]) -> Tensor:
    x, weight = arguments["x"], arguments["lm_head"].weight
    logits = F.linear(x, weight)[..., : arguments["vocab_size"]]
    return token_losses(logits.detach(), arguments["targets"])


def _place(arguments: Mapping[str, Any], names: Mapping[nn.Module, str]) -> str:
    """Of the first module among the arguments; of an MLP, which comes in two of them, the MLP itself."""
    places = [names[value] for value in arguments.values() if isinstance(value, nn.Module)]
    return places[0].removesuffix(".c_fc") if places else ""


# ------------------------------------------------------------------------------------------------------ tables


def worst_layers(rows: Sequence[Row]) -> list[Row]:
    """Of each result of each op the layer that is worst by the rule."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.subject, row.result), []).append(row)
    return [worst(group) for group in groups.values()]


def layer_table(rows: Sequence[Row]) -> Table:
    """A line a layer, a column a switch: error / eager's error of the result that is worst by the rule."""
    from rich.table import Table

    cells: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        layer = ".".join(row.place.split(".")[:2]) if row.place.startswith("h.") else row.place
        cells.setdefault((row.dtype, layer), {}).setdefault(row.toggle, []).append(row)
    table = Table("layer", "dtype", *Kernels.names(), box=None)
    for (dtype, layer), found in cells.items():
        table.add_row(layer, dtype, *(_cell(found.get(switch)) for switch in Kernels.names()))
    for column in table.columns:
        column.no_wrap = True
    return table


def _cell(rows: Sequence[Row] | None) -> str:
    if rows is None:
        return ""
    row = worst(rows)
    text = f"{row.ratio:.2f} {row.result}"
    if not row.ok:
        return f"[bold red]above: {text}[/]"
    return f"at rounding, {text}" if row.at_rounding else text
