"""`bench generate`: variants write the same tokens, rows say what was measured, a red check prints no number."""

import json
import sys
import warnings

import pytest
import torch
from test_bench_train import NANOGPT_LIKE
from tiny_models import tiny as tiny_model

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import ctranslate
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import generate
from fastgpt2.bench.timing.generate import BASELINE, CTRANSLATE2, NANOGPT, Setting
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import config, fbgemm

CPU = torch.device("cpu")
TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=64)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A size that is fast, verify that is green, and compilation that does nothing."""
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    monkeypatch.setattr(gate, "verified", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)


def run(folder, *more) -> int:
    options = "generate --device cpu --size tiny --prompt 4 --new 24 --seconds 0.01".split()
    return bench.main([*options, "--out", str(folder), *more])


def test_rows_say_what_was_measured(tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT_LIKE)
    assert run(tmp_path, "--batch", "1,2", "--dtype", "float32,bfloat16", "--nanogpt", str(tmp_path / "model.py")) == 0
    (file,) = tmp_path.glob("generate-*.json")
    results = Results.load(file)
    ours = ["PyTorch, SDPA, cache", "PyTorch, SDPA, cache + compile", BASELINE]
    for dtype in ("float32", "bfloat16"):
        labels = [[r["label"] for r in results.rows if (r["batch"], r["dtype"]) == (B, dtype)] for B in (1, 2)]
        theirs = [CTRANSLATE2] if dtype == "float32" and ctranslate.why_not() is None else []
        assert labels == [[*ours, *theirs, "PyTorch, SDPA, whole passes", NANOGPT]] * 2
    for row in results.rows:
        whole, first = row["time_ms"]["median"], row["first_ms"]["median"]
        assert row["tokens_per_s"]["median"] == pytest.approx(row["batch"] * 24e3 / whole)
        assert row["token_ms"] == pytest.approx((whole - first) / 23)
        assert (row["gb_per_s"] is None) == ("whole passes" in row["label"] or row["token_ms"] <= 0)
        assert row["speedup"]["over"] == BASELINE
        if row["label"] == BASELINE:
            assert row["speedup"]["median"] == 1.0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["kind"] == "generate"
    for row in results.rows:
        assert row["label"] in out
    assert "x ideal" in out


@pytest.mark.skipif(not fbgemm.is_available(), reason="PyTorch has no FBGEMM here")
def test_weights_of_8_bits_beside_float32(tmp_path, capsys):
    assert run(tmp_path, "--batch", "2", "--dtype", "int8", "--quick") == 0
    (file,) = tmp_path.glob("generate-*.json")
    rows = Results.load(file).rows
    assert [r["label"] for r in rows][:2] == ["PyTorch, SDPA, cache", "HuggingFace, cache, float32"]
    assert {r["speedup"]["over"] for r in rows} == {"HuggingFace, cache, float32"} and {r["dtype"] for r in rows} == {
        "int8"
    }
    setting = Setting("gpt2", "int8", B=2, T=32, new=64, device=CPU)
    assert setting.weight_bytes() == 124_439_808 - 1024 * 768
    assert setting.token_bytes() == setting.weight_bytes() + 4 * 2 * 12 * 768 * 2 * (32 + 32), "the cache is float32"


def test_ctranslate2_is_left_out_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert run(tmp_path, "--batch", "1", "--dtype", "float32", "--quick") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "CTranslate2" in line]
    assert len(said) == 1 and "ctranslate2" in said[0]


@pytest.mark.parametrize("compute_type", ctranslate.TYPES)
def test_ctranslate2_writes_our_text(compute_type):
    pytest.importorskip("ctranslate2")
    model, idx = tiny_model(block_size=64).eval(), torch.randint(50, (2, 4))
    ids, expected = ctranslate.writer(model, idx, compute_type)(20), generate.generate(model, idx, 20, greedy=True)
    assert ids.shape == (2, 24) and torch.equal(ids[:, :4], idx)
    if compute_type == "float32":
        assert torch.equal(ids, expected)


def test_whole_passes_that_take_long_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "WHOLE_PASSES_S", 0.0)
    assert run(tmp_path, "--batch", "2", "--dtype", "float32") == 0
    (file,) = tmp_path.glob("generate-*.json")
    assert not [row for row in Results.load(file).rows if "whole passes" in row["label"]]
    assert "whole passes: a text would take up to" in capsys.readouterr().out


def test_bytes_are_weights_and_the_cache_half_grown():
    setting = Setting("gpt2", "bfloat16", B=2, T=32, new=64, device=CPU)
    assert setting.weight_bytes() == 2 * (124_439_808 - 1024 * 768)
    assert setting.token_bytes() == setting.weight_bytes() + 2 * 2 * 12 * 768 * 2 * (32 + 32)


def test_other_tokens_print_no_numbers(tmp_path, capsys, monkeypatch):
    right = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: (right(*args, **more) + 1) % 64)
    # Also where other dtypes are timed: tokens are compared in float32, because rounding may decide between two.
    assert run(tmp_path, "--batch", "1", "--dtype", "bfloat16") == 1
    out, err = capsys.readouterr()
    assert "wrote other tokens" in err and "tokens/s" not in out and not list(tmp_path.iterdir())


def test_a_variant_that_fails_is_left_out(tmp_path, monkeypatch):
    right = generate.generate

    def uncaptured(*args, compile=False, **more):
        if compile:
            warnings.warn("the decode step was not captured as a CUDA graph: why", stacklevel=2)
        return right(*args, **more)

    monkeypatch.setattr(generate, "generate", uncaptured)
    assert run(tmp_path, "--batch", "1", "--dtype", "float32") == 0
    (file,) = tmp_path.glob("generate-*.json")
    results = Results.load(file)
    assert not [row for row in results.rows if "compile" in row["label"]]
    assert [e["why"] for e in results.left_out if "compile" in e["name"]] == [
        "the decode step was not captured as a CUDA graph: why"
    ]


def test_a_red_verify_prints_no_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate, "verified", lambda device: False)
    assert run(tmp_path) == 1
    assert "tokens/s" not in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dtype", "int4"], "--dtype is 'int4'"),
        (["--batch", "0"], "--batch is '0'"),
        (["--batch", "one"], "--batch is 'one'"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--new", "1"], "--new 1"),
        (["--prompt", "41"], "--prompt is 41 and --new 24, .* together 64 tokens"),
        (["--device", "warp"], "device is 'warp'"),
        (["--nanogpt", "/none/model.py"], "expected the path of nanoGPT's model.py"),
    ],
)
def test_mistakes_are_named(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *args)
