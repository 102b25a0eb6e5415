"""The switch between Triton and PyTorch: what it takes, what it refuses, where it holds."""

import contextlib
import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from hf_models import DEVICE, randomise

from fastgpt2 import GPT, GPTConfig, Kernels
from fastgpt2.gpt2 import ops

OPS = ("attention", "layer_norm", "mlp", "cross_entropy", "embedding")
CONFIG = GPTConfig(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
IDX = torch.arange(16, device=DEVICE).view(2, 8)


def tiny(kernels="torch", device=DEVICE) -> GPT:
    model = GPT(CONFIG, kernels)
    randomise(model)
    return model.to(device)


@pytest.fixture
def triton_calls(monkeypatch):
    """Ops that went to Triton, in order, by the name of their toggle."""
    calls = []

    def recording(toggle, function):
        def call(*args, **kwargs):
            calls.append(toggle)
            return function(*args, **kwargs)

        return call

    for toggle, name in [
        ("attention", "triton_causal_attention"),
        ("attention", "triton_decode_attention"),
        ("layer_norm, mlp", "triton_decode_linear"),
        ("layer_norm", "triton_layer_norm"),
        ("layer_norm", "triton_add_layer_norm"),
        ("mlp", "triton_mlp"),
        ("cross_entropy", "triton_linear_cross_entropy"),
        ("embedding", "triton_embedding"),
    ]:
        monkeypatch.setattr(ops, name, recording(toggle, getattr(ops, name)))
    return calls


# ---------------------------------------------------------------------------------------------------------- Kernels


def test_there_is_a_toggle_for_each_op():
    assert Kernels.names() == OPS
    assert Kernels() == Kernels.all("torch") == Kernels.parse("torch")
    assert set(dataclasses.astuple(Kernels.parse("triton"))) == {"triton"}


@pytest.mark.parametrize("spec", ["attention,mlp", "mlp, attention ", "attention,mlp,attention"])
def test_a_list_of_ops_is_those_on_triton(spec):
    assert Kernels.parse(spec) == Kernels(attention="triton", mlp="triton")


def test_a_kernels_is_a_value():
    kernels = Kernels(mlp="triton")
    assert Kernels.parse(kernels) is kernels and hash(kernels) == hash(Kernels(mlp="triton"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernels.mlp = "torch"


@pytest.mark.parametrize("spec", ["cuda", "", "attention,rope", "attention,", "Triton", "rope=triton", "attention="])
def test_unknown_names_are_refused_with_what_is_allowed(spec):
    wrong = spec.split(",")[-1]
    for make in (Kernels.parse, lambda spec: GPT(CONFIG, kernels=spec)):
        with pytest.raises(ValueError, match=f"kernels names '{wrong}', allowed are .*'torch'.*attention, layer_norm"):
            make(spec)


def test_other_types_and_backends_are_refused():
    with pytest.raises(TypeError, match="kernels is None"):
        Kernels.parse(None)
    with pytest.raises(TypeError, match="kernels is True"):
        tiny().kernels = True
    with pytest.raises(ValueError, match="Kernels.mlp is 'cuda', allowed are 'triton', 'torch' and 'fused'"):
        Kernels(mlp="cuda")
    with pytest.raises(ValueError, match="Kernels.embedding is 'fused', allowed are 'triton' and 'torch'"):
        Kernels(embedding="fused")
    with pytest.raises(TypeError, match="rope"):
        Kernels(rope="triton")


def test_the_former_name_of_mlp_is_accepted_and_read(monkeypatch):
    expected = Kernels(mlp="triton")
    assert Kernels(gelu="triton") == Kernels("torch", "torch", "triton") == Kernels.parse("gelu") == expected
    assert Kernels(mlp="triton", gelu="triton") == expected and expected.gelu == "triton" == expected.mlp
    assert Kernels.parse("attention, gelu,mlp") == Kernels(attention="triton", mlp="triton")
    assert repr(expected).count("mlp='triton'") == 1 and "gelu" not in repr(expected)
    assert list(dataclasses.asdict(Kernels(gelu="torch"))) == list(OPS) == list(vars(expected))
    assert dataclasses.replace(Kernels.all("triton"), mlp="torch").gelu == "torch"
    model = tiny("triton")
    with model.use_kernels(gelu="torch"):
        assert model.kernels == dataclasses.replace(Kernels.all("triton"), mlp="torch")
    monkeypatch.setenv("FASTGPT2_KERNELS", "gelu")
    assert tiny("auto", "cpu").kernels == expected


def test_two_names_of_one_switch_that_differ_are_refused_by_both():
    for make in (
        lambda: Kernels(mlp="torch", gelu="triton"),
        lambda: Kernels("torch", "torch", "torch", gelu="triton"),
        lambda: tiny().use_kernels(mlp="torch", gelu="triton").__enter__(),
    ):
        with pytest.raises(ValueError, match="mlp='torch' and gelu='triton' are two names of one switch.* give mlp"):
            make()
    with pytest.raises(ValueError, match="Kernels.gelu is 'cuda'"):
        Kernels(gelu="cuda")


def test_a_pickle_of_before_the_rename_is_read():
    before = Kernels.__new__(Kernels)
    before.__setstate__(dict(attention="torch", layer_norm="torch", gelu="triton", cross_entropy="torch"))
    assert before == Kernels(mlp="triton") == pickle.loads(pickle.dumps(before))


# ------------------------------------------------------------------------------------------------------ the model's


def test_the_model_s_switch_is_set_and_read():
    model = tiny("attention")
    assert model.kernels == Kernels(attention="triton")
    model.kernels = "triton"
    assert model.kernels == Kernels.all("triton")
    model.kernels = dataclasses.replace(model.kernels, mlp="torch")
    assert model.kernels.mlp == "torch" and model.kernels.attention == "triton"
    with pytest.raises(ValueError):
        model.kernels = "nonsense"
    assert model.kernels.mlp == "torch", "a refused value changes nothing"


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu(monkeypatch):
    monkeypatch.delenv("FASTGPT2_KERNELS", raising=False)
    assert tiny("auto", "cpu").kernels == Kernels.all("torch")
    assert GPT(CONFIG).kernels == Kernels.all("torch"), "auto is the default"
    assert ops.kernels_for("auto", torch.device("cuda", 1)) == Kernels.all("triton")
    assert ops.kernels_for("auto", torch.device("mps")) == Kernels.all("torch")


def test_the_environment_sets_what_auto_means(monkeypatch):
    monkeypatch.setenv("FASTGPT2_KERNELS", "mlp,attention")
    assert tiny("auto", "cpu").kernels == Kernels(attention="triton", mlp="triton")
    assert tiny("torch").kernels == Kernels.all("torch"), "what is asked for by name is not touched"
    model = tiny("torch", "cpu")
    model.kernels = "auto"
    assert model.kernels.mlp == "triton"
    for nothing in ("", "auto"):
        monkeypatch.setenv("FASTGPT2_KERNELS", nothing)
        assert tiny("auto", "cpu").kernels == Kernels.all("torch")
    monkeypatch.setenv("FASTGPT2_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        tiny("auto", "cpu")


def test_the_switch_is_no_part_of_the_model(tmp_path):
    model = tiny("triton")
    assert model.state_dict().keys() == tiny("torch").state_dict().keys() and not hasattr(CONFIG, "kernels")
    assert copy.deepcopy(model).kernels == model.kernels
    model.save_pretrained(tmp_path)
    assert "triton" not in (tmp_path / "config.json").read_text()
    assert GPT.from_pretrained(tmp_path, kernels="attention").kernels == Kernels(attention="triton")
    torch.save(model, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=False).kernels == model.kernels


def test_use_kernels_is_scoped_nested_and_undone_by_an_exception():
    model = tiny("torch")
    with model.use_kernels("triton") as same:
        assert same is model and model.kernels == Kernels.all("triton")
        with model.use_kernels(mlp="torch", attention="torch"):
            assert model.kernels == dataclasses.replace(Kernels.all("triton"), mlp="torch", attention="torch")
            with model.use_kernels("attention", embedding="triton"):
                assert model.kernels == Kernels(attention="triton", embedding="triton")
            assert model.kernels.mlp == "torch" and model.kernels.layer_norm == "triton"
        assert model.kernels == Kernels.all("triton")
    assert model.kernels == Kernels.all("torch")
    with contextlib.suppress(KeyError), model.use_kernels("triton"):
        raise KeyError
    assert model.kernels == Kernels.all("torch")


def test_a_refused_use_kernels_changes_nothing():
    model = tiny("auto", "cpu")
    for arguments, message in [
        (dict(spec="nonsense"), "nonsense"),
        (dict(rope="triton"), "use_kernels got 'rope', there are attention"),
        (dict(spec="triton", mlp="cuda"), "Kernels.mlp is 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message), model.use_kernels(**arguments):
            pytest.fail("entered")
        assert model.kernels == Kernels.all("torch"), arguments


def test_auto_stays_auto_after_use_kernels(monkeypatch):
    model = tiny("auto", "cpu")
    with model.use_kernels(mlp="triton"):
        assert model.kernels == Kernels(mlp="triton")
    assert model._kernels == "auto"


# ------------------------------------------------------------------------------------------------- who computes what


@pytest.mark.parametrize("op", OPS)
def test_each_toggle_moves_its_op_and_no_other(op, triton_calls):
    model = tiny(op)
    _, loss = model(IDX, IDX)
    loss.backward()
    assert set(triton_calls) == {op}


def test_every_op_of_every_layer_goes_through_its_toggle(triton_calls):
    tiny("triton")(IDX, IDX)
    counted = {op: triton_calls.count(op) for op in OPS}
    assert counted == dict(attention=2, layer_norm=5, mlp=2, cross_entropy=1, embedding=1)
    triton_calls.clear()
    tiny("torch")(IDX, IDX)
    assert not triton_calls


def test_two_models_in_one_process_do_not_disturb_each_other(triton_calls):
    """One on Triton, one on PyTorch, in turns, nested and in two threads at once."""
    a, b = tiny("torch").eval(), tiny("triton").eval()
    want = a(IDX)[0]
    for _ in range(2):
        triton_calls.clear()
        assert torch.equal(a(IDX)[0], want) and not triton_calls
        torch.testing.assert_close(b(IDX)[0], want, atol=1e-5, rtol=1e-5)
        assert set(triton_calls) == set(OPS) - {"cross_entropy"}
    with a.use_kernels("triton"), b.use_kernels("torch"):
        assert a.kernels == Kernels.all("triton") and b.kernels == Kernels.all("torch")
        triton_calls.clear()
        assert torch.equal(b(IDX)[0], want) and not triton_calls

    seen = []

    def use(model, spec):
        for _ in range(50):
            with model.use_kernels(spec):
                seen.append(model.kernels == Kernels.parse(spec))

    threads = [threading.Thread(target=use, args=args) for args in ((a, "attention"), (b, "mlp"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100 and all(seen)


def test_toggling_inside_training():
    """Backward takes the path that its forward took, and a run that changes kernels at every step learns the same."""

    def losses(specs):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for spec in specs:
            with model.use_kernels(spec):
                _, loss = model(IDX, IDX.roll(-1, 1))
            optimizer.zero_grad()
            loss.backward()  # outside
            optimizer.step()
            found.append(loss.item())
        return found

    mixed = losses(["torch", "triton", "attention", "layer_norm", "mlp", "cross_entropy,embedding"])
    plain = losses(["torch"] * 6)
    assert mixed == pytest.approx(plain, rel=1e-5) and plain[-1] < plain[0]


def test_toggling_under_compile_recompiles_once_and_takes_the_other_path():
    from torch._dynamo.testing import CompileCounterWithBackend

    def operators(graphs):
        return {str(n.target) for n in graphs[-1].graph.nodes if "fastgpt2" in str(n.target)}

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = tiny("torch").eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want = compiled(IDX)[0]
    assert counter.frame_count == 1 and not operators(counter.graphs)
    model.kernels = "triton"
    torch.testing.assert_close(compiled(IDX)[0], want, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
    assert any("attention" in name for name in operators(counter.graphs))
    for spec in ("torch", "triton", "torch"):
        model.kernels = spec
        compiled(IDX)
    assert counter.frame_count == 2, "both are kept"
    with model.use_kernels(attention="triton"):
        torch.testing.assert_close(compiled(IDX)[0], want, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 3 and len(operators(counter.graphs)) == 1


def test_toggling_under_compile_inside_training():
    torch._dynamo.reset()
    model, eager = tiny("torch"), tiny("torch")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for spec in ("torch", "triton", "torch", "mlp"):
        model.kernels = spec
        for m in (compiled, eager):
            m.zero_grad()
            m(IDX, IDX.roll(-1, 1))[1].backward()
        for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------------------------- other machines


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGPT2_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True)


PREPARE = """
import torch
from fastgpt2 import GPT, GPTConfig, Kernels
idx = torch.zeros(1, 4, dtype=torch.long)
config = GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=16)
def attempt(f):
    try:
        print(f())
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_triton_on_a_cpu_without_the_interpreter_is_an_error_that_names_op_and_toggle():
    run = python(
        PREPARE
        + """
for op in Kernels.names():
    attempt(lambda: GPT(config, kernels=op)(idx, idx)[1].shape)
attempt(lambda: GPT(config)(idx, idx)[1].shape)
"""
    )
    assert run.returncode == 0, run.stderr
    *errors, auto = run.stdout.splitlines()
    assert auto == "torch.Size([])" and len(errors) == len(OPS)
    for op, error in zip(OPS, errors, strict=True):
        assert error.startswith("RuntimeError") and "these tensors are on 'cpu'" in error
        assert "TRITON_INTERPRET=1" in error and "kernels='torch'" in error and f"{op}='torch'" in error


def test_without_triton_torch_works_and_triton_says_what_to_install():
    run = python(
        "import sys; sys.modules['triton'] = None"
        + PREPARE
        + """
attempt(lambda: GPT(config)(idx, idx)[1].shape)
attempt(lambda: GPT(config, kernels="torch").generate(idx, 2).shape)
attempt(lambda: Kernels(attention="cudnn").attention)
attempt(lambda: GPT(config, kernels="triton"))
attempt(lambda: Kernels(mlp="triton"))
attempt(lambda: Kernels(mlp="fused"))
attempt(lambda: GPT(config).use_kernels("attention").__enter__())
import fastgpt2.gpt2.ops as ops
attempt(lambda: ops.kernels_for("auto", torch.device("cuda")) == Kernels.all("torch"))
"""
    )
    assert run.returncode == 0, run.stderr
    plain, text, cudnn, *errors, auto = run.stdout.splitlines()
    assert plain == "torch.Size([])" and text == "torch.Size([1, 6])" and cudnn == "cudnn" and auto == "True"
    for error in errors:
        assert error.startswith("ImportError") and "pip install 'triton>=3.4'" in error


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("FASTGPT2_KERNELS", "atention")
    with pytest.raises(ValueError, match="variable FASTGPT2_KERNELS is 'atention': kernels names 'atention'"):
        GPT(CONFIG)
    monkeypatch.setenv("FASTGPT2_KERNELS", " torch ")
    assert GPT(CONFIG).kernels == Kernels.all("torch")


def test_without_triton_bench_says_what_to_install():
    run = python("import sys; sys.modules['triton'] = None; import fastgpt2.bench.__main__")
    assert run.returncode != 0 and "fastgpt2 bench needs the package triton: pip install" in run.stderr


def test_a_missing_part_of_ours_is_not_taken_for_a_missing_triton():
    run = python("import sys; sys.modules['fastgpt2.kernels.mlp'] = None; from fastgpt2 import GPT")
    assert run.returncode != 0 and "fastgpt2.kernels.mlp" in run.stderr
