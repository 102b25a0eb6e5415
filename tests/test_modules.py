"""What people do to a module works: every leaf of the model x every change, against the same modules called one by one.

`called_one_by_one` is GPT-2's equation as anybody would write it: it calls every leaf and fuses nothing.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hf_models import DEVICE, hf_gpt2
from interpreter import count_launches
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastgpt2 import GPT

T, NEW_TOKENS = 4, {"torch": 18, "triton": 2}  # from 16 tokens on, weights are laid out for decoding on a CPU
LEAVES = [
    *("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    *(f"transformer.h.1.{name}" for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")),
]


def called_one_by_one(model: GPT, idx: Tensor) -> Tensor:
    """Logits (B, T, V)."""
    gpt, (B, T), H = model.transformer, idx.shape, model.config.n_head
    x = gpt.wte(idx) + gpt.wpe(torch.arange(T, device=idx.device))
    for block in gpt.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(
            torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1), -math.inf
        )
        x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return model.lm_head(gpt.ln_f(x))


# ------------------------------------------------------------------------------------------------------------ changes


def replace(model: GPT, leaf: str, new: nn.Module) -> None:
    parent, _, name = leaf.rpartition(".")
    setattr(model.get_submodule(parent), name, new.to(DEVICE))


def forward_hook(model: GPT, leaf: str):
    model.get_submodule(leaf).register_forward_hook(lambda module, args, output: output * 0.5 + 0.1)


def pre_hook(model: GPT, leaf: str):
    """Other tokens and positions, or other numbers."""
    model.get_submodule(leaf).register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5 + 0.1 if args[0].is_floating_point() else args[0] * 0,)
    )


def full_backward_hook(model: GPT, leaf: str):
    module = model.get_submodule(leaf)
    module.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 0.5,))
    if not isinstance(module, nn.Embedding):  # its input has no gradient
        module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))


def global_hook(model: GPT, leaf: str):
    mine = model.get_submodule(leaf)
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.5 + 0.1 if module is mine else None
    )


class Adapted(nn.Module):
    """As LoRA's layers are: the layer that was there, and a branch beside it."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        rows, columns = self.weight.shape if base_layer.weight.dim() == 2 else (base_layer.weight.numel(), 1)
        self.A, self.B = nn.Parameter(torch.randn(2, columns) * 0.3), nn.Parameter(torch.randn(rows, 2) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if isinstance(self.base_layer, nn.Embedding):
            return y + F.embedding(x, self.B) @ self.A
        if isinstance(self.base_layer, nn.LayerNorm):
            return y + (self.B @ self.A)[:, 0]
        return y + x @ self.A.T @ self.B.T


def lora(model: GPT, leaf: str):
    replace(model, leaf, Adapted(model.get_submodule(leaf)))


def weight_norm(model: GPT, leaf: str):
    module = model.get_submodule(leaf)
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(0.5)


def pruned(model: GPT, leaf: str):
    prune.random_unstructured(model.get_submodule(leaf), "weight", 0.5)


def frozen(model: GPT, leaf: str):
    for parameter in model.get_submodule(leaf).parameters():
        parameter.requires_grad_(False)


def subclass(model: GPT, leaf: str):
    module = model.get_submodule(leaf)

    class Halved(type(module)):
        def forward(self, x):
            return super().forward(x) * 0.5

    module.__class__ = Halved


def plain_replacement(model: GPT, leaf: str):
    """Of torch's own class, with other weights: what a user swaps in."""
    old = model.get_submodule(leaf)
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, old.out_features, bias=True)
    elif isinstance(old, nn.Embedding):
        new = nn.Embedding(old.num_embeddings, old.embedding_dim)
    else:
        new = nn.LayerNorm(old.normalized_shape, eps=0.1, bias=False)
    for p in new.parameters():
        nn.init.normal_(p, std=0.3)
    replace(model, leaf, new)


def patched_forward(model: GPT, leaf: str):
    """As accelerate does it."""
    module = model.get_submodule(leaf)
    before = module.forward
    module.forward = lambda x: before(x) * 0.5


CHANGES = [
    *(forward_hook, pre_hook, full_backward_hook, global_hook, lora, weight_norm, pruned, frozen, subclass),
    *(plain_replacement, patched_forward),
]


def losses_and_gradients(model: GPT, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return gradients(model) | {"loss": loss.detach()}


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_leaf_and_every_change(change, leaf, kernels):
    n_new = NEW_TOKENS[kernels]
    model = tiny(block_size=T + n_new, n_embd=32).to(DEVICE)
    idx, targets = torch.randint(50, (2, 2, T), device=DEVICE)
    unchanged = losses_and_gradients(model, called_one_by_one(model, idx), targets)
    handle = change(model, leaf)
    try:
        expected = losses_and_gradients(model, called_one_by_one(model, idx), targets)
        assert any(name not in expected or not torch.equal(expected[name], unchanged[name]) for name in unchanged), (
            "the change has no effect"
        )

        model.kernels = kernels
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        found = gradients(model) | {"loss": loss.detach()}
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(idx, targets)[0], called_one_by_one(model, idx), rtol=1e-3, atol=1e-4)
            written = model.generate(idx, n_new, greedy=True)
            assert written.shape == (2, T + n_new)
            # The most likely token each time; or, where two are as likely up to rounding, one of them.
            logits = called_one_by_one(model, written[:, :-1])[:, T - 1 :]
            chosen = logits.gather(2, written[:, T:, None]).squeeze(2)
            torch.testing.assert_close(chosen, logits.amax(2), rtol=1e-3, atol=1e-3)
    finally:
        if handle is not None:
            handle.remove()


def test_only_the_changed_layer_is_called():
    """The rest of its block, and the other blocks, stay fused."""
    model = tiny(block_size=T, n_embd=32).to(DEVICE)
    model.kernels = "triton"
    idx, targets = torch.randint(50, (2, 2, T), device=DEVICE)

    def launches() -> list[str]:
        with count_launches() as log:
            model(idx, targets)[1].backward()
        return [launch.name for launch in log]

    names = launches()
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda module, args, output: None)
    assert launches() == names  # bias and GELU are a kernel still, and c_proj's bias is c_proj's
    model.transformer.h[1].ln_2.register_forward_hook(lambda module, args, output: None)
    left = launches()
    assert names.count("_layer_norm_fwd_kernel") - left.count("_layer_norm_fwd_kernel") == 1
    assert left.count("_gelu_fwd_kernel") == left.count("_attention_fwd_kernel") == model.config.n_layer


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_hooks_on_parts_see_what_huggingfaces_see(kernels):
    """Block, attention, MLP: a tensor (B, T, C) goes in and one comes out, and what a hook returns takes its place."""
    hf = hf_gpt2(n_embd=32).to(DEVICE)
    model, idx = GPT.from_huggingface(hf, kernels=kernels), torch.randint(50, (2, T), device=DEVICE)
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}

    def watch(which: str):
        def hook(module, args, output):
            seen[which].append(output if isinstance(output, Tensor) else output[0])

        return hook

    for which, root in (("ours", model), ("theirs", hf)):
        for part in (root.transformer.h[0], root.transformer.h[0].attn, root.transformer.h[1].mlp, root.transformer):
            part.register_forward_hook(watch(which))
    logits = model(idx, idx)[0] if kernels == "torch" else model.eval()(idx, idx)[0]
    expected = hf(idx).logits
    seen["theirs"][-1] = seen["theirs"][-1][0] if isinstance(seen["theirs"][-1], tuple) else seen["theirs"][-1]
    torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    model.transformer.h[1].attn.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    hf.transformer.h[1].attn.register_forward_hook(lambda module, args, output: (output[0] * 0, *output[1:]))
    torch.testing.assert_close(model(idx)[0], hf(idx).logits[:, -1:], rtol=1e-3, atol=1e-4)
