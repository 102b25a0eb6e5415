"""Weights of 8 bits and of float16 by FBGEMM: their error, what they refuse, and the same text token by token."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch import nn

from fastgpt2.gpt2 import cli, fbgemm, packed
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.fbgemm import Float16Linear, Int8Linear, pack_float16
from fastgpt2.gpt2.generation.decoder import WORTH_PREPARING
from fastgpt2.gpt2.generation.generate import generate
from fastgpt2.gpt2.packed import quantize_int8

pytestmark = pytest.mark.skipif(not fbgemm.is_available(), reason="PyTorch has no FBGEMM here")


def rounded_to_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) float64, each row in steps of a 127th of its largest magnitude."""
    step = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-300) / 127
    return (weight.double() / step).round() * step


def relative(error: torch.Tensor, truth: torch.Tensor) -> float:
    return (error.double().norm() / truth.double().norm()).item()


# ------------------------------------------------------------------------------------------------------------ int8


@pytest.mark.parametrize("shape", [(1, 16), (3, 1, 33), (40, 256)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_error_is_that_of_the_weights(shape, bias):
    layer = nn.Linear(shape[-1], 24, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        layer.weight[3] = 0.0
        x[..., 5] *= 30.0  # one large channel, as GPT-2 has them
        if bias:
            layer.bias.normal_(std=10.0)
        y = Int8Linear(layer)(x)
    assert y.shape == (*shape[:-1], 24) and y.dtype == torch.float32
    truth = x.double() @ rounded_to_8_bits(layer.weight).t() + (layer.bias.double() if bias else 0.0)
    assert relative(y - truth, truth) < 2e-3, "activations of 7 bits would be wrong by more"
    assert 0 < relative(y - layer(x), truth) < 2e-2


def test_extreme_weights_do_not_overflow():
    """The largest products that there are, all of one sign: FBGEMM's sums of 16 bits hold them."""
    layer = nn.Linear(512, 8, bias=False)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        torch.testing.assert_close(Int8Linear(layer)(torch.full((2, 512), -3.0)), torch.full((2, 8), -1536.0))


def test_large_and_small_rows_together():
    """One scale is that of all rows: those that are a hundredth as large have 8 bits left."""
    layer, x = Int8Linear(nn.Linear(64, 24, bias=False)), torch.randn(6, 64)
    with torch.no_grad():
        alone = torch.cat([layer(row[None]) for row in x])
        assert relative(layer(x) - alone, alone) < 1e-3
        x[1:] *= 100.0
        assert relative(layer(x)[:1] - alone[:1], alone[:1]) < 2e-2
        assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, dict(bias=False), dict(vocab_multiple=64)], ids=str)
def test_text_of_a_cache_is_that_of_whole_passes(dtype, settings):
    model = tiny(block_size=64, **settings).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    small, idx = quantize_int8(model), torch.randint(50, (2, 4))
    assert model.training and not small.training and small.kernels == model.kernels
    assert sum(isinstance(m, Int8Linear) for m in small.modules()) == 2 * 4 + 1
    ids = generate(small, idx, 24, greedy=True)
    with torch.no_grad():
        logits = small(ids[:, :-1], ids[:, 1:])[0]
        reference = model.eval()(ids[:, :-1], ids[:, 1:])[0]
    if dtype == torch.float32:
        assert torch.equal(logits[:, 3:].argmax(-1), ids[:, 4:])
        assert 1e-4 < relative(logits - reference, reference) < 0.03
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight is small.transformer.wte.weight, "still tied"


def test_copies():
    small, idx = quantize_int8(tiny()), torch.randint(50, (1, 5))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(small)(idx)[0], small(idx)[0])
        assert torch.equal(quantize_int8(small)(idx)[0], small(idx)[0])


def test_it_is_for_generation_only(tmp_path):
    small, idx = quantize_int8(tiny()), torch.randint(50, (1, 5))
    with pytest.raises(RuntimeError, match="weights of 8 bits have no gradient"):
        small.train()(idx, idx)[1].backward()
    with pytest.raises(ValueError, match="weights of 8 bits are neither saved nor loaded: save the model that they"):
        small.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="weights of 8 bits are neither saved nor loaded"):
        small.state_dict()  # it would be one without these layers
    with pytest.raises(RuntimeError, match="or load into it"):
        small.load_state_dict(tiny().state_dict())
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="x is on meta, weights of 8 bits are computed with on a CPU"):
        small.lm_head(torch.randn(1, 16, device="meta"))


def test_what_cannot_be_rounded_is_named(monkeypatch):
    class Adapted(nn.Linear):
        pass

    model = tiny()
    model.transformer.h[1].mlp.c_fc = Adapted(16, 64)
    with pytest.raises(ValueError, match=r"model.transformer.h.1.mlp.c_fc is no plain nn.Linear"):
        quantize_int8(model)
    model = tiny()
    model.transformer.h[0].attn.c_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"model.transformer.h.0.attn.c_proj is no plain nn.Linear or has hooks"):
        quantize_int8(model)
    with pytest.raises(ValueError, match=r"model is on meta, .* call model.cpu\(\) first"):
        quantize_int8(tiny().to("meta"))
    monkeypatch.setattr(fbgemm, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need FBGEMM"):
        quantize_int8(tiny())


def test_lora_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"c_attn.* is no plain nn.Linear .* merge LoRA"):
        quantize_int8(adapted)
    assert isinstance(quantize_int8(adapted.merge_and_unload()).lm_head, Int8Linear)


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def folder(tmp_path):
    tiny(vocab_size=256, block_size=64).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    return str(tmp_path)


def test_sample_with_weights_of_8_bits(folder, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        Int8Linear, "product", lambda layer, x, right=Int8Linear.product: calls.append(1) or right(layer, x)
    )
    command = ["sample", "--checkpoint", folder, "--device", "cpu", "--prompt", "ab", "--max-new-tokens", "3"]
    assert cli.main([*command, "--weights", "int8"]) == 0 and len(calls) == 3 * 9
    for more, message in (
        (["--weights", "int4"], "int8"),
        (
            ["--weights", "int8", "--compile"],
            "--weights is int8, which is for a CPU and without --compile, and --compile",
        ),
    ):
        capsys.readouterr()
        assert cli.main([*command, *more]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- bfloat16 as float16


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("many_by_onednn", [True, False])
def test_bfloat16_is_within_the_rule(rows, bias, many_by_onednn):
    layer, x = nn.Linear(96, 40, bias=bias).bfloat16(), torch.randn(rows, 96).bfloat16()
    fast = Float16Linear(layer.weight, layer.bias, pack_float16(layer.weight.detach()))
    fast.many_by_onednn = many_by_onednn
    with torch.no_grad():
        truth, y, eager = copy.deepcopy(layer).double()(x.double()), fast(x), layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, eager) == (
        many_by_onednn and rows == 40 or torch.equal(y, eager)
    )
    assert (y - truth).abs().max() <= 2 * (eager - truth).abs().max()


@pytest.mark.parametrize("wrong", [1e5, float("inf"), float("nan")])
def test_weights_that_float16_would_change_are_not_packed(wrong):
    weight = torch.randn(8, 16).bfloat16()
    assert pack_float16(weight) is not None
    assert pack_float16(weight * 1e-6) is None, "too small for float16"
    weight[3, 5] = wrong
    assert pack_float16(weight) is None


@pytest.mark.parametrize(
    "avx512_bf16, amx, amd, onednn",
    [(True, False, False, True), (True, True, False, False), (True, False, True, True), (False, False, False, False)],
)
def test_who_multiplies_bfloat16(monkeypatch, avx512_bf16, amx, amd, onednn):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(packed.linear, "ONEDNN_IS_FASTER", amd)
    assert packed._by_onednn(torch.bfloat16) == onednn


def test_bfloat16_text(monkeypatch):
    """A model in bfloat16 writes by FBGEMM; a layer that float16 cannot hold stays PyTorch's."""
    monkeypatch.setattr(packed, "_by_onednn", lambda dtype: False)
    model, idx = tiny(block_size=64).bfloat16().eval(), torch.randint(50, (2, 4))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1e-6)
    read = []
    forward = Float16Linear.forward
    monkeypatch.setattr(Float16Linear, "forward", lambda layer, x: read.append(x.shape) or forward(layer, x))
    generate(model, idx, WORTH_PREPARING, greedy=True)
    assert len(read) == WORTH_PREPARING * (2 * 4 + 1 - 1)
    with torch.no_grad():
        ids = torch.randint(50, (1, 20))
        logits, exact = packed.packed(model)(ids)[0], copy.deepcopy(model).double()(ids)[0]
        eager = model(ids)[0]
    assert relative(logits - exact, exact) <= 2 * relative(eager - exact, exact)
