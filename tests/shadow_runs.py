"""A small model that TritonAdamW trains under autocast, what its passes compute and cast, and changes of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.training.triton_adamw import TritonAdamW

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=1, n_embd=16)
READ = 4 + 1 + 1  # weights of a block and the head, and the bias of c_attn, that products read, with every switch on
READ_BY_TORCH = READ + 3  # and the biases that PyTorch's products add


def new_model(device, kernels="torch", **settings) -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), kernels=kernels).to(device)


def optimizer_of(model: nn.Module, device) -> TritonAdamW:
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.type, optimizer="triton", max_norm=1.0)


def a_batch(device) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(CONFIG.vocab_size, (2, 2, 8), device=device))


def forward(model: nn.Module, pair, dtype=torch.bfloat16) -> Tensor:
    with torch.autocast(pair[0].device.type, dtype):
        return model(*pair)[1]


def passed(model: nn.Module, pair, dtype=torch.bfloat16) -> list[Tensor | None]:
    """The loss of a pass and all gradients."""
    model.zero_grad()
    loss = forward(model, pair, dtype)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def by_casts(model: nn.Module, pair, dtype=torch.bfloat16) -> list[Tensor | None]:
    """As `passed`, of a copy of the model, which has no shadows."""
    return passed(copy.deepcopy(model), pair, dtype)


def same(found: list, expected: list) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Casts(TorchDispatchMode):
    """Counts what reads a parameter's memory and writes another dtype."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.addresses, self.count = {p.data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if read is not None and result.dtype != args[read].dtype:
            self.count += args[read].data_ptr() in self.addresses
        return result


def casts_of_a_step(model: nn.Module, optimizer, pair, passes: int = 1) -> int:
    with Casts(model) as casts:
        for _ in range(passes):
            forward(model, pair).backward()
        optimizer.step()
        optimizer.zero_grad()
    return casts.count


def a_trained_one(device, pair) -> tuple[GPT, TritonAdamW]:
    """A model after a step whose weights have shadows, and its optimizer."""
    model = new_model(device)
    optimizer = optimizer_of(model, device)
    forward(model, pair).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def change_in_place(model, device):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3, 5] += 1


def load(model, device):
    model.load_state_dict(new_model(device, vocab_size=31).state_dict())


def assign(model, device):
    model.load_state_dict(new_model(device).state_dict(), assign=True)


def replace_data(model, device):
    for p in model.parameters():
        p.data = p.data + 0.5


def transpose_data(model, device):
    p = model.transformer.h[0].attn.c_proj.weight
    p.data = p.data.t()


def exchange_data(model, device):
    """As an average of weights is put in for evaluation, and left in."""
    other = new_model(device, n_layer=1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data, q.data = q.data + 0.25, p.data


def exchange_two(model, device):
    first, second = model.transformer.h[0].attn.c_proj.weight, nn.Parameter(torch.ones(16, 16, device=device))
    torch.utils.swap_tensors(first, second)


def to_and_fro(model, device):
    model.double()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.float()


def another_optimizer(model, device):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def average(model, device):
    swapped = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), swapped.parameters(), strict=True):
            p.copy_(q * 0.5)


def freeze(model, device):
    model.transformer.h[0].mlp.requires_grad_(False)


def untie(model, device):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 3)
