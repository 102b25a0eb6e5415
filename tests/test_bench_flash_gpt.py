"""flash-attn's own GPT-2 as a baseline: on a stub with its interface, since it is not installed and needs a GPU.

The stub computes by PyTorch what flash_attn/models/gpt.py computes, under the same module names, and refuses flags as
it does where an extension is missing.
"""

import re
import sys
from collections import namedtuple
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import transformers.models.gpt2.modeling_gpt2  # noqa: F401, before the stub: transformers looks for flash_attn
from torch import nn

from fastgpt2.bench.cases import flash_gpt, variants
from fastgpt2.bench.cases.variants import FLASH_ATTN, OURS, Family, Variant
from fastgpt2.bench.timing import steps
from fastgpt2.gpt2 import config
from fastgpt2.gpt2.model import GPT

CPU = torch.device("cpu")
TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.mixer, self.mlp = nn.Module(), nn.Module()
        self.norm1, self.norm2 = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_epsilon) for _ in range(2))
        self.mixer.Wqkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.mixer.out_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.mlp.fc1 = nn.Linear(c.hidden_size, 4 * c.hidden_size)
        self.mlp.fc2 = nn.Linear(4 * c.hidden_size, c.hidden_size)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.mixer.Wqkv(self.norm1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.mixer.out_proj(attended)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)), approximate="tanh"))


class GPTLMHeadModel(nn.Module):
    missing: tuple[str, ...] = ()  # flags whose extension is not there

    def __init__(self, c):
        super().__init__()
        assert c.activation_function == "gelu_new" and c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0
        for flag in self.missing:
            if getattr(c, flag):
                raise ImportError(f"{flag}: its extension is not installed")
        self.config = c
        self.transformer = nn.Module()
        self.transformer.embeddings = nn.Module()
        self.transformer.embeddings.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.transformer.embeddings.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.transformer.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.transformer.ln_f = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight

    def forward(self, input_ids):
        e = self.transformer.embeddings
        x = e.word_embeddings(input_ids) + e.position_embeddings.weight[: input_ids.size(1)]
        for layer in self.transformer.layers:
            x = layer(x)
        return namedtuple("CausalLMOutput", ["logits"])(self.lm_head(self.transformer.ln_f(x)))


def remap_state_dict_hf_gpt2(state, c):
    names = {
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.c_attn": "mixer.Wqkv",
        "attn.c_proj": "mixer.out_proj",
    }
    found = {"transformer.embeddings.position_embeddings.weight": state.pop("wpe.weight")}
    found["lm_head.weight"] = found["transformer.embeddings.word_embeddings.weight"] = state.pop("wte.weight")
    for layer in range(c.num_hidden_layers):
        state.pop(f"h.{layer}.attn.bias")  # as flash-attn does: a KeyError without it
    for key, value in state.items():
        for theirs, its in names.items():
            if theirs in key and key.endswith("weight"):
                value = value.t()
            key = key.replace(theirs, its)
        found["transformer." + re.sub(r"^h\.(\d+)\.(ln_)?", lambda m: f"layers.{m[1]}." + "norm" * bool(m[2]), key)] = (
            value
        )
    return found


class CrossEntropyLoss(nn.CrossEntropyLoss):
    def __init__(self, ignore_index, inplace_backward):
        super().__init__(ignore_index=ignore_index)


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    for name in ("flash_attn", "flash_attn.models", "flash_attn.models.gpt", "flash_attn.losses"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    losses = ModuleType("flash_attn.losses.cross_entropy")
    losses.CrossEntropyLoss = CrossEntropyLoss
    monkeypatch.setitem(sys.modules, losses.__name__, losses)
    gpt = sys.modules["flash_attn.models.gpt"]
    gpt.GPTLMHeadModel, gpt.remap_state_dict_hf_gpt2 = GPTLMHeadModel, remap_state_dict_hf_gpt2


def test_it_computes_our_gradient():
    setting = steps.Setting("tiny", 2, 16, "float32", CPU, 0.1)
    weights = GPT(setting.config)
    gradients = []
    for name in (OURS, FLASH_ATTN):
        family = Family(name, setting.config, weights, None, CPU)
        gradients.append(family.gradient(family.backward(Variant(name), *setting.batch(), setting.autocast)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert family.label(Variant(FLASH_ATTN)) == "flash-attn's GPT, all four flags"
    assert family.label(Variant(FLASH_ATTN, road=variants.GRAPH)).endswith("flags + CUDA graph")


@pytest.mark.parametrize(
    ("missing", "label"),
    [
        (("fused_mlp", "fused_bias_fc"), "flash-attn's GPT, use_flash_attn fused_dropout_add_ln"),
        (("fused_mlp", "fused_dropout_add_ln"), "flash-attn's GPT, use_flash_attn"),
    ],
)
def test_the_label_says_which_flags_are_on(monkeypatch, missing, label):
    monkeypatch.setattr(GPTLMHeadModel, "missing", missing)
    cfg = config.GPTConfig(block_size=16, **TINY)
    assert flash_gpt.label(flash_gpt.build(cfg, GPT(cfg))) == label


def test_without_its_attention_there_is_none(monkeypatch):
    monkeypatch.setattr(GPTLMHeadModel, "missing", ("use_flash_attn",))
    cfg = config.GPTConfig(block_size=16, **TINY)
    with pytest.raises(ImportError, match="use_flash_attn: its extension"):
        flash_gpt.build(cfg, GPT(cfg))


def test_why_it_is_left_out(monkeypatch):
    assert flash_gpt.why_not(CPU) == "it needs a GPU"
    monkeypatch.setattr(flash_gpt.peers, "installed", lambda module: False)
    assert flash_gpt.why_not(torch.device("cuda")) == "flash_attn is not installed"
    monkeypatch.setattr(flash_gpt.peers, "installed", lambda module: True)
    assert flash_gpt.why_not(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "flash_attn.models.gpt", None)
    assert "cannot be imported" in flash_gpt.why_not(torch.device("cuda"))
