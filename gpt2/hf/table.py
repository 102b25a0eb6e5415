"""A table of how the ops of a transformers model are computed: op, road, why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf import attention, models
from fastgpt2.gpt2.hf.blocks import Block, weights
from fastgpt2.gpt2.hf.stand_in import StandIn, check_module
from fastgpt2.gpt2.ops import Kernels
from fastgpt2.gpt2.stock import LinearWeights, is_stock

THEIRS = "transformers"
LINEAR = "matrix products are PyTorch's, on Conv1D's weight by strides; the kernel for few rows reads (out, in) alone"


class Row(NamedTuple):
    """op: the op. road: what computes it, a switch's value ("triton", "torch", ...), "modules" (called one by one),
    "transformers" or "none". why: the reason in words."""

    op: str
    road: str
    why: str


class Report(tuple[Row, ...]):
    """The rows of `report`, printed as a table."""

    def __str__(self) -> str:
        rows = [Row("op", "road", "why"), *self]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{op:<{widths[0]}}  {road:<{widths[1]}}  {why}" for op, road, why in rows)


def report(model: nn.Module) -> Report:
    """How the first GPT-2 of transformers in `model` is computed with its parameters on their current device.

    Raises TypeError if there is none.
    """
    from transformers import GPT2LMHeadModel, GPT2Model

    check_module(model)
    modules = list(model.modules())
    body: Any = next((m for m in modules if isinstance(m, GPT2Model)), None)
    if body is None:
        raise TypeError(f"model is {type(model).__name__}, expected one with transformers' GPT2Model in it")
    head: Any = next((m for m in modules if isinstance(m, GPT2LMHeadModel)), None)
    if not isinstance(body, models.Model):
        return Report([_registered(body), Row("all else", THEIRS, "hf.accelerate(model) was not called")])
    kernels = ops.kernels_for(body._fastgpt2.kernels, body.wte.weight.device)
    return Report([*_body(body, kernels), *([] if head is None else _head(head, kernels))])


def _registered(body: Any) -> Row:
    """The attention of a model that is not accelerated, or whose calls transformers' forward computes."""
    name = body.config._attn_implementation
    if name != attention.NAME:
        return Row("attention", THEIRS, f"attn_implementation={name!r}")
    if not attention.is_registered():
        return Row("attention", "none", "attn_implementation='fastgpt2' without hf.register()")
    given = attention._registration
    road = ops.kernels_for(given.kernels, body.wte.weight.device).attention
    fallback = "what it cannot do is an error" if given.fallback is None else f"else {given.fallback}"
    return Row("attention", road, f"attn_implementation='fastgpt2', {fallback}")


def _body(body: Any, kernels: Kernels) -> Iterator[Row]:
    why = models.why_not(body)
    if why is not None:
        way = f"transformers' forward: {why}"
        yield Row("embedding", THEIRS, way)
        yield _registered(body)._replace(why=f"{way}; attn_implementation={body.config._attn_implementation!r}")
    else:
        tables = [name for name in ("wte", "wpe") if not is_stock(getattr(body, name), nn.Embedding)]
        yield _row("embedding", kernels.embedding, "embedding", tables)
        yield Row("attention", kernels.attention, _switch("attention", kernels.attention))
    norms, mlps, layers = [], [], []
    for i, block in enumerate(body.h):
        if not isinstance(block, Block):
            layers.append(f"h.{i}")
            continue
        norms += [f"h.{i}.{name}" for name in ("ln_1", "ln_2") if not is_stock(getattr(block, name), nn.LayerNorm)]
        if not is_stock(block.mlp, block.theirs.MLP):
            mlps.append(f"h.{i}.mlp")
        elif not is_stock(block.mlp.act, block.theirs.Gelu):
            mlps.append(f"h.{i}.mlp.act")
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            layer = getattr(getattr(block, part), name, None)
            if not isinstance(weights(layer, block.theirs), LinearWeights):
                layers.append(f"h.{i}.{part}.{name}")
    norms += [] if why is not None or is_stock(body.ln_f, nn.LayerNorm) else ["ln_f"]
    yield _row("add + layer norm", kernels.layer_norm, "layer_norm", norms)
    yield _row("mlp", kernels.mlp, "mlp", mlps, _in_products(body, kernels))
    yield _row("linear layers", "torch", "", layers)


def _head(head: Any, kernels: Kernels) -> Iterator[Row]:
    if not isinstance(head, StandIn) or head._fastgpt2 is None:
        return
    why = models.why_logits(head, kernels)
    if why is None:
        yield Row("loss, training", "triton", "training_logits=False: no logits in training steps with labels")
    else:
        yield Row("loss, training", "torch", why)
    when = "except in training steps with labels" if why is None else "always"
    yield Row("logits", "torch", f"lm_head is called, with transformers' own loss function, {when}")


def _switch(op: str, road: str) -> str:
    return f"kernels.{op}={road!r}"


def _in_products(body: Any, kernels: Kernels) -> str:
    weight = body.wte.weight
    passes = ops.mlp_in_products(kernels, weight.dtype, weight.device)
    return f", GELU inside Triton's products {passes}" if passes else ""


def _row(op: str, road: str, switch: str, called: list[str], more: str = "") -> Row:
    """The row of an op that is fused, except for the modules `called`."""
    why = (_switch(switch, road) if switch else LINEAR) + more
    if called:
        shown = ", ".join(called[:4]) + (f" and {len(called) - 4} more" if len(called) > 4 else "")
        why += f"; replaced or with hooks, so called as modules: {shown}"
    return Row(op, road, why)
