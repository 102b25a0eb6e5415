"""The repository for HuggingFace's kernel hub: read by their package, and its layers in transformers' GPT-2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import DEVICE

from fastgpt2.bench.hub.__main__ import build
from fastgpt2.kernels.gelu import gelu

kernels = pytest.importorskip("kernels")
BACKEND = {"cpu": "cpu", "cuda": "rocm" if torch.version.hip else "cuda"}[DEVICE.type]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "fastgpt2"
    build(folder, (BACKEND,))
    return folder


def test_their_package_loads_it_beside_ours(repository):
    theirs = kernels.get_local_kernel(repository)
    assert theirs.gelu is not gelu and sorted(theirs.__all__) == theirs.__all__
    x = torch.randn(5, 64, device=DEVICE)
    assert torch.equal(theirs.gelu(x), gelu(x))
    (loaded,) = [k for k in kernels.get_loaded_kernels() if k.module is theirs]
    namespace = loaded.metadata.id.removesuffix(f"_{BACKEND}")
    compiled = torch.compile(theirs.gelu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), gelu(x))
    assert hasattr(getattr(torch.ops, namespace), "gelu_fwd") and hasattr(torch.ops.fastgpt2, "gelu_fwd")


def test_another_build_may_be_beside_it_and_none_on_top(tmp_path):
    builds = build(tmp_path / "new")
    assert [b.name for b in builds] == ["torch-cuda", "torch-rocm"]
    assert [json.loads((b / "metadata.json").read_text())["backend"]["type"] for b in builds] == ["cuda", "rocm"]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"build", "benchmarks"}
    with pytest.raises(ValueError, match="new is not empty"):
        build(tmp_path / "new")


def test_the_benchmarks_verify(repository):
    """As `kernels benchmark` runs them, but for the timing."""
    scope: dict = {}
    exec((repository / "benchmarks" / "benchmark.py").read_text(), scope)
    scope["N"], scope["C"] = 4, 64
    found = [kind for kind in kernels.Benchmark.__subclasses__() if kind.__module__ == "builtins"]
    assert len(found) == 3
    for kind in found:
        bench = kind()
        bench.kernel, bench.device = kernels.get_local_kernel(repository), DEVICE.type
        bench.setup()
        for name in [name for name in dir(kind) if name.startswith("benchmark_")]:
            getattr(bench, name)()
            expected = getattr(bench, name.replace("benchmark_", "verify_"))()
            torch.testing.assert_close(bench.out, expected, rtol=1e-2, atol=1e-2)


# transformers enables the integration for one short range of versions of `kernels`, which need not be installable where
# this runs. It asks one function, which here answers yes for the version that is installed.
ENABLED = """
import copy, sys
from pathlib import Path
import torch
import transformers.utils.import_utils as versions
versions.is_kernels_available = lambda *range: True
import transformers.utils
transformers.utils.is_kernels_available = versions.is_kernels_available
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from hf_models import hf_gpt2
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

folder, backend = sys.argv[1:]
device = "cpu" if backend == "cpu" else "cuda"
theirs_by = {"NewGELU": "GELU", "LayerNorm": "LayerNorm", "GPT2MLP": "GPT2MLP"}
mapping = {name: {backend: LocalLayerRepository(Path(folder), layer_name=of)} for name, of in theirs_by.items()}
assert NewGELUActivation.kernel_layer_name == "NewGELU", "the integration is off"
replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")
eager = hf_gpt2().to(device)
ids = torch.randint(61, (2, 9), device=device)
expected = eager(ids, labels=ids)
expected.loss.backward()
for last in ("NewGELUActivation", "GPT2MLP"):
    if last == "GPT2MLP":
        replace_kernel_forward_from_hub(GPT2MLP, last)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        ours = kernelize(copy.deepcopy(eager), mode=Mode.TRAINING, device=backend)
    changed = {type(m).__name__ for m in ours.modules() if "torch-" in m.forward.__func__.__code__.co_filename}
    assert changed >= {"LayerNorm", last}, changed
    ours.zero_grad()
    found = ours(ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
"""


def test_layers_in_transformers_gpt2_with_the_integration_enabled(repository):
    command = [sys.executable, "-c", ENABLED, str(repository), BACKEND]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
