"""What the tests of gpt2/hf/ share: batches, and a model's logits, loss and gradients held against the fp64 truth."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hf_models import DEVICE, hf_gpt2
from numerics import compare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2 import hf
from fastgpt2.gpt2 import ops

B, T, V = 2, 9, 61
IDS = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(3)).to(DEVICE)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * T]).to(DEVICE)
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0, 1, 2, 3]]).to(DEVICE)
BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "left": dict(attention_mask=LEFT),
    "right": dict(attention_mask=LEFT.flip(1)),
    "packed": dict(position_ids=PACKED),
}
# How `generate` keeps what it has computed.
WAYS = {
    "dynamic": {},
    "left": dict(attention_mask=LEFT),
    "static-left": dict(attention_mask=LEFT, cache_implementation="static"),
    "static": dict(cache_implementation="static"),
    "beams": dict(num_beams=2),
    "no-cache": dict(use_cache=False),
}


def pair(
    kernels: str = "torch", dtype: torch.dtype = torch.float32, training_logits: bool = True, **settings: Any
) -> tuple[nn.Module, nn.Module]:
    """(eager, the same model accelerated)."""
    eager = hf_gpt2(dtype=dtype, **settings).to(DEVICE)
    return eager, hf.accelerate(copy.deepcopy(eager), kernels, training_logits)


def labels_of(batch: dict[str, Any], ids: Tensor = IDS) -> Tensor:
    """ids without padding, and without each row's first real token, which padding would have to predict."""
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    before = torch.nn.functional.pad(real, (1, 0))[:, :-1]
    return ids.masked_fill(~(real & before), -100)


def results(model: nn.Module, batch: dict[str, Any], ids: Tensor = IDS) -> dict[str, Tensor | None]:
    """logits of real tokens (where there are any), loss, and the gradient of every parameter."""
    model.zero_grad()
    out = model(ids, labels=labels_of(batch, ids), use_cache=False, **batch)
    out.loss.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    if out.logits is not None:
        found["logits"] = out.logits.detach()[batch.get("attention_mask", torch.ones_like(ids)).bool()]
    return found | {"loss": out.loss.detach()}


def same_as(
    ours: list[nn.Module], eager: nn.Module, name: str = "plain", ids: Tensor = IDS, roundings: int = 4
) -> None:
    """The 2x rule for all of `results`: every model of `ours` and transformers' eager one, against this in float64."""
    batch = BATCHES[name]
    exact = copy.deepcopy(eager).double()
    for block in exact.transformer.h:
        block.attn.reorder_and_upcast_attn = False  # knows float32 only
    truth, theirs = results(exact, batch, ids), results(eager, batch, ids)
    failures = []
    for model in ours:
        found = results(model, batch, ids)
        assert found.keys() <= truth.keys() and len(found) >= len(truth) - 1
        for what, value in found.items():
            try:
                compare(value, theirs[what], truth[what], roundings=4)  # several ops in a row
            except AssertionError as failure:
                failures.append(f"{what}: {failure}")
    assert not failures, "\n".join(failures)


class Copies(TorchDispatchMode):
    """Names of operators that write floating-point inputs elsewhere. (`copy_` is how Triton's interpreter works.)"""

    NAMES = ("clone", "cat", "stack", "_to_copy", "constant_pad_nd", "repeat", "index", "gather")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.NAMES and result.is_floating_point():
            self.found.append(function.overloadpacket.__name__)
        return result


def written(model: nn.Module, new: int = 4, **more: Any) -> Tensor:
    """Greedy ids after IDS."""
    model.eval()
    settings = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, disable_compile=True) | more
    return model.generate(IDS, **settings)


def called_ops(monkeypatch, *names: str) -> dict[str, int]:
    """How often each op of `ops` is called."""
    counts = dict.fromkeys(names, 0)

    def counting(name, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts
