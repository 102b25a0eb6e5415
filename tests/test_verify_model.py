"""`fastgpt2 verify --model`: one's own weights and text; a kernel that is wrong in one layer is named with it."""

import dataclasses

import numpy as np
import pytest
import torch

from fastgpt2 import GPTConfig
from fastgpt2.bench.verify import error_rule, layer_errors, verify, weight_errors
from fastgpt2.bench.verify.batch import read_batch
from fastgpt2.gpt2 import fbgemm, ops
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer

CONFIG = GPTConfig(block_size=9, vocab_size=256, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    verify.random_model(CONFIG, torch.device("cpu")).float().save_pretrained(path)
    ByteTokenizer().save(path)
    return path


def ran(monkeypatch, folder, *options) -> tuple[int, list[error_rule.Row], list[error_rule.Row]]:
    """(exit status, rows of the ops, rows of the whole model)."""
    found = []
    show = verify.show
    monkeypatch.setattr(verify, "show", lambda rows, layers: (found.extend((layers, rows)), show(rows, layers)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = verify.main(["--model", str(folder), "--device", device, "--dtype", "float32", *options])
    return status, *found


def test_every_op_in_every_layer_and_the_whole_model(monkeypatch, folder, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question")
    status, layers, rows = ran(monkeypatch, folder, "--batch", str(tmp_path / "text.txt"), "--tokens", "16")
    assert status == 0
    results = {(row.place, row.toggle): set() for row in layers}
    for row in layers:
        results[row.place, row.toggle].add(row.result)
    norm = {"output", "d x", "d norm weight", "d norm bias"}
    weights = {f"d {layer} {p}" for layer in ("c_fc", "c_proj") for p in ("weight", "bias")}
    summed = norm | {"sum", "d residual", "d x_bias"}
    assert results == {
        ("wte", "embedding"): {"output", "d wte weight", "d wpe weight"},
        ("ln_f", "layer_norm"): summed,
        ("lm_head", "cross_entropy"): {"loss", "d x", "d lm_head weight"},
        **{(f"h.{i}.attn", "attention"): {"output", "d qkv"} for i in range(2)},
        ("h.0.ln_1", "layer_norm"): norm,
        **{(name, "layer_norm"): summed for name in ("h.0.ln_2", "h.1.ln_1", "h.1.ln_2")},
        **{(f"h.{i}.mlp", "mlp"): {"output", "d h", *weights} for i in range(2)},
    }
    assert {row.toggle for row in rows} == {*ops.Kernels.names(), "mlp=fused", "all"}
    printed = capsys.readouterr().out
    assert "2 layers, 2 x 8 tokens" in printed and f"all {len(layers) + len(rows)} within" in printed
    assert error_rule.RULE in printed and "…" not in printed


def test_a_padded_token_table_is_compared_with_huggingfaces():
    """HuggingFace's model does not have the padded rows, whose gradients are zero."""
    config = dataclasses.replace(CONFIG, n_layer=1, vocab_multiple=100)
    model = verify.random_model(config, torch.device("cpu"))
    assert model.transformer.wte.weight.size(0) > config.vocab_size
    idx = torch.randint(config.vocab_size, (1, 2), generator=torch.Generator().manual_seed(0))
    found = verify._huggingface_results(model, idx, idx)
    model(idx, idx)[1].backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close({name: found[name] for name in gradients}, gradients)


def test_a_kernel_that_is_wrong_in_one_layer_is_named(monkeypatch, folder, capsys):
    """The second layer's attention only, by a hundredth."""
    attention, calls = ops.triton_causal_attention, []

    def wrong(qkv, *args, **kwargs):
        calls.append(qkv)
        return attention(qkv, *args, **kwargs) * (1.01 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(ops, "triton_causal_attention", wrong)
    monkeypatch.setattr(verify, "verify_model", lambda *args: iter(()))
    status, layers, _ = ran(monkeypatch, folder, "--tokens", "8")
    assert status == 1
    assert {(row.place, row.result) for row in layers if not row.ok} == {
        ("h.1.attn", "output"),
        ("h.1.attn", "d qkv"),
    }
    printed = capsys.readouterr().out
    assert f"2 of {len(layers)} above it" in printed
    (line,) = [line for line in printed.splitlines() if line.split()[:1] == ["h.1"]]
    assert line.count("above: ") == 1


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's NumPy
def test_a_weight_that_is_not_a_number_is_red(monkeypatch, tmp_path):
    model = verify.random_model(CONFIG, torch.device("cpu")).float()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    monkeypatch.setattr(verify, "verify_model", lambda *args: iter(()))
    status, layers, _ = ran(monkeypatch, tmp_path, "--tokens", "8")
    assert status == 1 and "h.1.mlp" in {row.place for row in layers if not row.ok}
    assert all(row.ok for row in layers if row.place == "wte" and row.result == "output")


@pytest.mark.skipif(not fbgemm.is_available(), reason="PyTorch has no FBGEMM here")
def test_the_error_of_weights_of_8_bits_is_stated(folder, capsys, monkeypatch):
    found = []
    show = weight_errors.show
    monkeypatch.setattr(weight_errors, "show", lambda rows: (found.extend(rows), show(rows)))
    command = ["--model", str(folder), "--weights", "int8", "--tokens", "64"]
    assert verify.main(command) == 0
    exact, single, half, eight = found
    assert [row.name for row in found] == ["float64", "float32", "bfloat16", "int8"]
    assert exact.error == 0 and exact.same == 1 and single.error < 1e-5 < half.error
    assert half.error / 10 < eight.error < 0.1 and 0 < abs(eight.loss - exact.loss) < 0.1
    printed = capsys.readouterr().out
    assert f"Weights of 8 bits change the logits by {eight.error:.1e} of their size" in printed.replace("\n", " ")
    for wrong, message in (
        (command[2:4], "--weights is int8, which is for --model"),
        ([*command, "--dtype", "float32"], "--dtype is float32, and --weights"),
        ([*command, "--device", "cuda"], "--device is cuda, and --weights int8 is for a CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            verify.main(wrong)


def test_what_is_recorded_is_what_the_model_computes(folder, device):
    model = verify.GPT.from_pretrained(folder).to(device)
    idx = torch.arange(18).view(2, 9).to(device)
    before = {name: p.clone() for name, p in model.named_parameters()}
    calls = layer_errors.recorded_calls(model, idx[:, :-1], idx[:, 1:])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    with model.use_kernels("torch"):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
    given = calls[-1].arguments
    _, again = ops.head_loss(**given)
    torch.testing.assert_close(again, loss)
    assert calls[-1].upstream["loss"] == 1.0
    assert all(set(call.upstream) >= {"output"} for call in calls[:-1]), "each output's gradient came back"


def test_rows_are_bad_where_even_eager_is_infinitely_far_off():
    row = error_rule.Row("op", "op", "output", "float16", *2 * [float("inf")], None, float("inf"), False)
    assert not row.ok and error_rule.worst([row, dataclasses.replace(row, error=1.0, allowed=0.5)]) is row


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("tokens", "shape"), [(64, (5, 9)), (16, (2, 9)), (6, (2, 4)), (1, (1, 2))])
def test_token_ids_come_from_files(tmp_path, tokens, shape):
    ids = np.arange(60, dtype=np.uint16).reshape(5, 12)
    np.save(tmp_path / "ids.npy", ids)
    torch.save(torch.from_numpy(ids.astype(np.int32)), tmp_path / "ids.pt")
    config = dataclasses.replace(CONFIG, block_size=8)
    for name in ("ids.npy", "ids.pt"):
        found = read_batch(str(tmp_path / name), None, config, tokens)
        assert found.dtype == torch.int64 and tuple(found.shape) == shape
        assert torch.equal(found, torch.from_numpy(ids.astype(np.int64))[: shape[0], : shape[1]])


def test_text_is_cut_into_rows(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    found = read_batch(str(tmp_path / "text.txt"), ByteTokenizer(), CONFIG, 10)
    assert [bytes(row.tolist()) for row in found] == [b"abcdef", b"ghijkl"]
    assert tuple(read_batch(None, ByteTokenizer(), CONFIG, 18).shape) == (2, 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.ones((2, 3)), "a.npy holds no token ids"),
        ("a.npy", np.array([[1, 2, 256]]), r"a.npy holds token 256, the model has 0\.\.255"),
        ("a.pt", torch.tensor([[1, -1]]), "a.pt holds token -1"),
        ("a.pt", torch.tensor([1, 2, 3]), r"a.pt holds torch.int64 \(3,\), expected integers \(B, T\)"),
        ("a.pt", {"a": 1}, "a.pt holds dict"),
        ("a.pt", None, "a.pt holds no token ids"),
        ("a.txt", "x", "a.txt is 1 tokens long"),
    ],
)
def test_a_file_that_is_no_batch_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, str):
        path.write_text(content)
    elif content is None:
        path.write_bytes(b"not a file of tensors")
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_batch(str(path), ByteTokenizer(), CONFIG, 16)
