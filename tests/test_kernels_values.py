"""Values that one switch alone has, such as mlp="fused": how they are typed, and which road they take."""

import dataclasses

import pytest
import torch
from test_kernels_flag import CONFIG, IDX, tiny

from fastgpt2 import GPT, Kernels
from fastgpt2.gpt2 import ops


@pytest.fixture
def roads(monkeypatch):
    """The functions of MLPs that were called, in order."""
    called = []
    for name in ("triton_mlp", "triton_fused_mlp", "triton_decode_linear"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: called.append(n) or f(*a, **k))
    return called


def test_a_list_may_give_a_switch_a_value_of_its_own():
    assert Kernels.parse("attention, mlp = fused") == Kernels(attention="triton", mlp="fused")
    assert Kernels.parse("gelu=fused,mlp=fused,layer_norm=torch") == Kernels(mlp="fused") == Kernels(gelu="fused")
    with pytest.raises(ValueError, match="kernels is 'mlp,mlp=fused', which gives mlp two values"):
        Kernels.parse("mlp,mlp=fused")
    with pytest.raises(ValueError, match="Kernels.attention is 'fused', allowed are 'triton', 'torch' and 'cudnn'"):
        Kernels.parse("attention=fused")
    with pytest.raises(ValueError, match="kernels has mlp on Triton.*'gelu_erf'"):
        GPT(dataclasses.replace(CONFIG, activation="gelu_erf"), Kernels(mlp="fused"))


def test_the_fused_mlp_is_another_road_for_training_and_the_same_for_decoding(roads):
    want, fused = tiny("layer_norm,mlp"), tiny("layer_norm,mlp=fused")
    results = [model(IDX, IDX)[1] for model in (want, fused)]
    assert roads == ["triton_mlp"] * 2 + ["triton_fused_mlp"] * 2
    for loss in results:
        loss.backward()
    for (name, a), b in zip(want.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    roads.clear()
    prompt = IDX[:, :3]
    assert torch.equal(*(model.eval().generate(prompt, 3, top_k=1) for model in (want, fused)))
    assert set(roads) == {"triton_decode_linear"}


@pytest.mark.parametrize("part", ["c_fc", "c_proj"])
def test_a_fused_mlp_calls_modules_with_hooks(part, roads):
    model = tiny("mlp=fused")
    want = model(IDX, IDX)[1]
    seen = []
    getattr(model.transformer.h[1].mlp, part).register_forward_hook(lambda *args: seen.append(part))
    roads.clear()
    torch.testing.assert_close(model(IDX, IDX)[1], want)
    assert seen == [part] and roads == ["triton_fused_mlp"]
