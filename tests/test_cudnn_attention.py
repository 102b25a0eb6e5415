"""attention="cudnn": PyTorch's attention by cuDNN and nothing else. A stand-in says what PyTorch was allowed."""

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt2 import GPT, Kernels
from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.variants import GRAPH, MODES, OURS, ROADS, Variant
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import train
from fastgpt2.gpt2 import cudnn_attention, ops

CUDNN = Kernels(attention="cudnn")
LAYERS = 2  # of the tiny model
IDX = torch.arange(16).view(2, 8)
BACKENDS = ("flash", "cudnn", "mem_efficient", "math")


def enabled() -> set[str]:
    return {name for name in BACKENDS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()}


@pytest.fixture
def calls(monkeypatch):
    """The backends that PyTorch is allowed at each call of SDPA. The CPU stands in for a GPU, float32 is allowed."""
    found, sdpa = [], F.scaled_dot_product_attention

    def stand_in(*args, **options):
        found.append(enabled())
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(*args, **options)

    monkeypatch.setattr(cudnn_attention, "why_not", lambda device: None)
    monkeypatch.setattr(cudnn_attention, "DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
    return found


def gradients(model: GPT) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(IDX, IDX)[1], list(model.parameters())))


# --------------------------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize("spec", ["attention=cudnn", " attention = cudnn ", "attention=cudnn,mlp=torch"])
def test_a_list_says_how(spec):
    assert Kernels.parse(spec) == CUDNN


def test_the_others_of_a_list_are_on_triton():
    assert Kernels.parse("attention=cudnn,gelu") == Kernels(attention="cudnn", mlp="triton")
    assert Kernels.parse("attention=triton") == Kernels(attention="triton")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mlp=cudnn", "Kernels.mlp is 'cudnn', allowed are 'triton', 'torch' and 'fused'"),
        ("attention=cuda", "Kernels.attention is 'cuda', allowed are 'triton', 'torch' and 'cudnn'"),
        ("attention=", "kernels names 'attention='"),
        ("cudnn", "kernels names 'cudnn'"),
        ("attention,attention=cudnn", "which gives attention two values"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        Kernels.parse(spec)


def test_the_environment_and_a_block_choose_it(monkeypatch):
    monkeypatch.setenv("FASTGPT2_KERNELS", "attention=cudnn")
    model = tiny()
    model.kernels = "auto"
    assert model.kernels == CUDNN
    model.kernels = "torch"
    with model.use_kernels(attention="cudnn"):
        assert model.kernels == CUDNN


def test_models_of_transformers_do_not_offer_it():
    pytest.importorskip("transformers")
    from fastgpt2 import hf

    with pytest.raises(ValueError, match="kernels has attention='cudnn', allowed for models of transformers"):
        hf.register(CUDNN)
    with pytest.raises(ValueError, match="kernels has attention='cudnn', allowed for models of transformers"):
        hf.accelerate(nn.Linear(1, 1), "attention=cudnn")


# ------------------------------------------------------------------------------------------------------ the road


def test_pytorch_is_allowed_cudnn_and_nothing_else(calls):
    model = tiny()
    expected = gradients(model)
    before = enabled()
    calls.clear()
    model.kernels = CUDNN
    found = gradients(model)
    assert calls == [{"cudnn"}] * LAYERS and enabled() == before
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION])
def test_it_compiles_into_one_graph_that_holds_the_choice(monkeypatch, backend):
    """By a backend that a CPU has in cuDNN's place; by cuDNN itself PyTorch refuses to trace for a CPU."""
    monkeypatch.setattr(cudnn_attention, "why_not", lambda device: None)
    monkeypatch.setattr(cudnn_attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(cudnn_attention, "SDPBackend", types.SimpleNamespace(CUDNN_ATTENTION=backend))
    model = tiny()
    expected = model(IDX, IDX)[1]
    model.kernels = "attention=cudnn"
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if backend == SDPBackend.MATH:
        torch.testing.assert_close(compiled(IDX, IDX)[1], expected)
    else:
        with pytest.raises(RuntimeError, match="No viable backend"):
            compiled(IDX, IDX)


def test_the_prompt_is_its_own_and_tokens_over_the_cache_are_pytorchs(calls):
    model = tiny().eval()
    model.kernels = "attention=cudnn"
    with torch.no_grad():
        found = model.generate(IDX[:, :4], 3, greedy=True)
        model.kernels = "torch"
        assert calls[:LAYERS] == [{"cudnn"}] * LAYERS
        assert len(calls) == 3 * LAYERS and {"cudnn"} not in calls[LAYERS:]
        assert torch.equal(model.generate(IDX[:, :4], 3, greedy=True), found)


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it may run")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(RuntimeError, match="attention='cudnn': it needs an NVIDIA GPU, the device is 'cpu'"):
        with tiny().use_kernels(attention="cudnn") as model:
            model(IDX)


def refused(error: type[Exception], message: str, heads: int = 2, dtype: torch.dtype = torch.bfloat16, **more) -> None:
    qkv = torch.zeros(1, 4, 3 * 32, dtype=dtype)
    with pytest.raises(error, match=message):
        ops.causal_attention(qkv, heads, 0.25, 0.0, CUDNN, **more)


def test_what_it_cannot_do_is_named(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "why_not", lambda device: None)
    refused(TypeError, "qkv is torch.float32, allowed are bfloat16 and float16", dtype=torch.float32)
    refused(ValueError, "the head size is 4, allowed is a multiple of 8 up to 128", heads=8)
    starts = ops.document_mask(torch.tensor([0, 2, 4], dtype=torch.int32), 1, 4, CUDNN)
    refused(ValueError, "document_starts is given, allowed is None", mask=starts)
    refused(RuntimeError, "does not run cuDNN's attention here")  # PyTorch says so on a CPU: nothing else is tried


def test_other_errors_stay_themselves(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cudnn_attention, "why_not", lambda device: None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    refused(RuntimeError, "^out of memory")


# --------------------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize("road", ROADS)
def test_bench_times_it_beside_sdpa_and_beside_triton(road):
    both = [Variant(OURS, dataclasses.replace(Kernels.all(b), attention="cudnn"), road) for b in ("torch", "triton")]
    here = [v for v in variants.all_variants(False, with_cudnn=True) if v.road == road]
    assert [v for v in here if v.kernels.attention == "cudnn"] == both
    assert [variants.on_triton(v) for v in both] == [False, True] and not any(v.one_switch for v in both)
    assert set(here) - set(both) == {v for v in variants.all_variants(False) if v.road == road}


def test_labels_name_it():
    assert variants.label(CUDNN, GRAPH) == "PyTorch, cuDNN attention + CUDA graph"
    by_triton = dataclasses.replace(Kernels.all("triton"), attention="cudnn")
    assert variants.label(by_triton) == "Triton, cuDNN attention"
    assert variants.label(dataclasses.replace(CUDNN, mlp="triton")) == "Triton: mlp, cuDNN attention"


def test_without_a_gpu_bench_says_why_it_is_left_out():
    results = Results.begin("train", torch.device("cpu"), {})
    chosen = train.select(torch.device("cpu"), True, ("launched", *MODES), False, results)
    assert chosen and not any(v.kernels.attention == "cudnn" for v in chosen)
    left_out = {entry["name"]: entry["why"] for entry in results.left_out}
    assert left_out["cuDNN attention"] == "it needs an NVIDIA GPU, the device is 'cpu'"
