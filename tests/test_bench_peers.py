"""Peers at their best: called as their interfaces want it, left out with the reason, and of a known version.

Most of them need a GPU. Where one is not installed, a stub takes its place that has the same interface and computes by
PyTorch: what is tested is that our inputs reach it rightly, and what it returns us.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import peers
from fastgpt2.bench.cases.registry import operations, sized_cases
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import ops, peaks, timing
from fastgpt2.bench.verify import gate
from fastgpt2.kernels import _device

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASES = {case.op: case for case in sized_cases(16, 64, torch.float32, 32, V=96)}


def attend(q, k, v, causal):
    """(B, T, H, D) each."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False):
    x = x if residual is None else x + residual
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return (normed, x) if prenorm else normed


def mlp(x, weight1, weight2, bias1, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def fused_mlp_func(x, weight1, weight2, bias1=None, bias2=None, activation="gelu_approx", heuristic=0):
    assert activation == "gelu_approx" and heuristic in (0, -1)
    return mlp(x, weight1, weight2, bias1, bias2)


def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None):
    assert activation == "gelu_tanh_approx"
    return mlp(x, weight1, weight2, bias1, bias2)


STUBS = [  # label, op, module, function, what it computes
    ("flash-attn", "causal_attention", "flash_attn", "flash_attn_qkvpacked_func",
     lambda qkv, causal: attend(*qkv.unbind(2), causal)),
    ("flash-attn", "layer_norm", "flash_attn.ops.triton.layer_norm", "layer_norm_fn", layer_norm_fn),
    ("flash-attn", "add_layer_norm", "flash_attn.ops.triton.layer_norm", "layer_norm_fn", layer_norm_fn),
    ("flash-attn", "mlp", "flash_attn.ops.fused_dense", "fused_mlp_func", fused_mlp_func),
    ("flash-attn 3", "causal_attention", "flash_attn_interface", "flash_attn_qkvpacked_func",
     lambda qkv, causal: attend(*qkv.unbind(2), causal)),
    ("flash-attn 4", "causal_attention", "flash_attn.cute", "flash_attn_func",
     lambda q, k, v, causal: (attend(q, k, v, causal), None)),
    ("quack", "linear_cross_entropy", "quack.linear_cross_entropy", "chunked_linear_cross_entropy",
     lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target)),
    ("quack", "mlp", "quack.mlp", "mlp_func", mlp_func),
]  # fmt: skip


@pytest.mark.parametrize(("label", "op", "module", "function", "computes"), STUBS)
def test_a_peer_gets_our_inputs(monkeypatch, label, op, module, function, computes):
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], function, computes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    case = CASES[op]
    inputs = case.inputs(CPU)
    expected = ops.values(case, inputs, case.eager)
    assert ops.differs(ops.values(case, inputs, peers.PEERS[label].makers[op]()), expected) < 1e-5


def test_every_peer_is_of_an_op():
    for peer in peers.PEERS.values():
        assert peer.module and peer.package and set(peer.makers) <= set(operations())


def test_every_stub_is_of_a_peer():
    """And every peer that imports something has one, but for those whose interface is tested with them installed."""
    stubbed = {(label, op) for label, op, *_ in STUBS}
    every = {(label, op) for label, peer in peers.PEERS.items() if peer.module != "torch" for op in peer.makers}
    assert stubbed <= every and {label for label, _ in every - stubbed} == {"Liger", "xformers"}


# ------------------------------------------------------------------------------------------------------ PyTorch's


def test_attention_by_name_takes_that_backend(monkeypatch):
    """On a CPU flash is there by name, cuDNN is not: that one fails instead of another one being timed."""
    case = CASES["causal_attention"]
    inputs = case.inputs(CPU)
    found = {label: peers.PEERS[label].makers["causal_attention"]() for label in ("SDPA by flash", "SDPA by cuDNN")}
    expected = ops.values(case, inputs, case.eager)
    assert ops.differs(ops.values(case, inputs, found["SDPA by flash"]), expected) < 1e-5
    called = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: called.append(enabled_backends()) or plain(*a, **k)
    )
    found["SDPA by flash"](inputs[0])
    with pytest.raises(RuntimeError, match="No viable backend"):
        found["SDPA by cuDNN"](inputs[0])
    assert called == [{"flash"}, {"cudnn"}]


def enabled_backends() -> set[str]:
    names = {"flash": "flash", "cudnn": "cudnn", "mem_efficient": "mem_efficient", "math": "math"}
    return {name for name, part in names.items() if getattr(torch.backends.cuda, f"{part}_sdp_enabled")()}


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this PyTorch has no such options")
def test_the_loss_of_pytorch_is_by_chunks(monkeypatch):
    given = []
    plain = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: given.append(k["options"]) or plain(*a, **k))
    found, missing = peers.peers("linear_cross_entropy", CPU)
    case = CASES["linear_cross_entropy"]
    inputs = case.inputs(CPU)
    computed = ops.values(case, inputs, found["F.linear_cross_entropy"])
    assert ops.differs(computed, ops.values(case, inputs, case.eager)) < 1e-5
    assert isinstance(given[0], torch.nn.LinearCrossEntropyOptions)
    assert "F.linear_cross_entropy" not in missing


def test_an_older_pytorch_does_not_have_it(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    found, missing = peers.peers("linear_cross_entropy", CPU)
    assert "F.linear_cross_entropy" not in found
    assert missing["F.linear_cross_entropy"] == f"PyTorch {torch.__version__} does not have it"


# -------------------------------------------------------------------------------------------- where, and which one


def test_a_peer_for_other_gpus_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda module: True)
    monkeypatch.setattr(_device, "capability", lambda device: (8, 0))
    _, missing = peers.peers("causal_attention", GPU)
    for label in ("flash-attn 3", "flash-attn 4"):
        assert missing[label] == "it needs compute capability 9.0, this GPU has 8.0"
    assert "capability" not in missing.get("flash-attn", "")
    monkeypatch.setattr(_device, "capability", lambda device: (10, 0))
    _, missing = peers.peers("causal_attention", GPU)
    assert not [why for why in missing.values() if "capability" in why]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    _, missing = peers.peers("causal_attention", GPU)
    assert missing["flash-attn 4"] == "it needs an NVIDIA GPU"


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda module: module == "torch")
    for op in operations():
        found, missing = peers.peers(op, GPU if op != "causal_attention" else CPU)
        for label, peer in peers.PEERS.items():
            if op in peer.makers and peer.module != "torch":
                assert missing[label] == f"{peer.module} is not installed" and label not in found


def test_a_part_of_a_package_that_is_not_there_is_not_installed():
    assert peers.installed("torch.nn") and not peers.installed("torch.none")
    assert not peers.installed("no_such_package") and not peers.installed("no_such_package.part")


def test_versions_are_of_the_package_that_a_label_names(monkeypatch):
    assert peers.version(ops.PYTORCH) is None and peers.version(ops.OURS) is None
    monkeypatch.setattr(peers.metadata, "version", lambda package: {"quack-kernels": "1.2"}[package])
    assert peers.version("quack") == "1.2"
    monkeypatch.setattr(peers.metadata, "version", not_installed)
    assert peers.version("quack") is None, "built in place"


def not_installed(package):
    raise peers.metadata.PackageNotFoundError(package)


# --------------------------------------------------------------------------------------------------------- a run


def test_a_backward_that_runs_once_is_timed_with_its_forward_only(tmp_path, monkeypatch):
    """As the loss of PyTorch by chunks: alone it cannot be timed, and the rest of it is."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.used = False
            ctx.save_for_backward(x)
            return F.gelu(x, approximate="tanh")

        @staticmethod
        def backward(ctx, dy):
            if ctx.used:
                raise RuntimeError("its buffers are used up")
            ctx.used = True
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, dy)[0]

    scope = ops.Scope(shapes=((16, 64),), tokens=32, dtype=torch.float32, compiled=False, budget_s=0.0)
    monkeypatch.setattr(ops.Scope, "of", classmethod(lambda cls, device, quick: scope))
    monkeypatch.setattr(peaks, "copy_bytes_per_s", lambda device: 1e9)
    monkeypatch.setattr(peaks, "matmul_flops_per_s", lambda device, dtype: 1e12)
    monkeypatch.setattr(gate, "verified", lambda device: True)
    monkeypatch.setattr(ops, "peers", lambda op, device: ({"once": Once.apply}, {}))
    assert bench.main(["ops", "--device", "cpu", "--op", "gelu", "--out", str(tmp_path)]) == 0
    results = Results.load(next(tmp_path.iterdir()))
    assert {row["direction"] for row in results.rows if row["label"] == "once"} == {"forward", "both"}
    assert {row["direction"] for row in results.rows if row["label"] == ops.PYTORCH} == set(ops.DIRECTIONS)
    (entry,) = (entry for entry in results.left_out if entry["name"].startswith("once"))
    assert entry["name"].endswith("backward)") and entry["why"] == "its buffers are used up"
    assert not timing.out_of_memory(RuntimeError(entry["why"]))
