"""`fastgpt2 eval`, typed as a user types it."""

import json

import numpy as np
import pytest
import test_evaluate
import test_hellaswag
from test_cli import failed
from tiny_models import tiny

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data import shards
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer, CharTokenizer
from fastgpt2.gpt2.data.windows import eval_batches, read_text
from fastgpt2.gpt2.evaluation.evaluate import mean_loss, text_loss
from fastgpt2.gpt2.evaluation.hellaswag import hellaswag, read_examples

model, file = test_evaluate.model, test_hellaswag.file
TEXT = "the theatre, then another thing.\n" * 10


@pytest.fixture
def checkpoint(tmp_path, model):
    model.save_pretrained(tmp_path / "checkpoint")
    test_evaluate.BPE.save(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "prepared"
    test_evaluate.BPE.save(out)
    options = f"--source {tmp_path}/text.txt --tokenizer {out} --processes 1 --val-tokens 150 --out {out}"
    assert cli.main(["prepare", *options.split()]) == 0
    return str(out)


def test_all_of_it_at_once(tmp_path, capsys, model, checkpoint, prepared, file):
    options = ["--data", prepared, "--text", str(tmp_path / "text.txt"), "--hellaswag", str(file), "--stride", "4"]
    capsys.readouterr()
    assert cli.main(["eval", "--checkpoint", checkpoint, "--batch-size", "2", "--tokens", "64", *options]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    windows = eval_batches(shards.open_tokens(prepared, "val"), test_evaluate.T, 2, 4)
    loss = mean_loss(model, windows, test_evaluate.CPU)
    assert found["checkpoint"] == checkpoint
    assert found["val"] == {"tokens": 64, "loss": pytest.approx(loss)}
    text = read_text(tmp_path / "text.txt")
    expected = text_loss(model, test_evaluate.BPE, text, stride=4, device=test_evaluate.CPU)
    assert found["text"] == pytest.approx(vars(expected))
    score = hellaswag(model, test_evaluate.BPE, read_examples(file), device=test_evaluate.CPU)
    assert found["hellaswag"] == vars(score)
    assert [line.split()[0] for line in lines] == ["data", "text", "hellaswag"]
    assert f"val loss {loss:.4f} nats a token, 64 tokens" in lines[0]
    assert f"perplexity {expected.perplexity:.2f}, {expected.bits_per_byte:.4f} bits a byte" in lines[1]
    harness, nanogpt = lines[2].split("; ")[:2]
    assert "EleutherAI's harness: " in harness and "build-nanogpt: " in nanogpt and "3 examples" in lines[2]
    assert f"acc_norm {score.harness_acc_norm:.4f}, acc_bytes {score.harness_acc_bytes:.4f}" in harness
    assert f"acc {score.nanogpt_acc:.4f}, acc_norm {score.nanogpt_acc_norm:.4f}" in nanogpt


def test_a_limit_takes_the_first_examples(capsys, checkpoint, file):
    assert cli.main(["eval", "--checkpoint", checkpoint, "--hellaswag", str(file), "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hellaswag"]["examples"] == 1


def test_shards_of_others_are_read(tmp_path, capsys, checkpoint):
    test_evaluate.BPE.encode(TEXT).tofile(tmp_path / "val.bin")
    assert cli.main(["eval", "--checkpoint", checkpoint, "--data", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val"]["loss"] > 0
    np.array([258] * 100, np.uint16).tofile(tmp_path / "val.bin")
    said = failed(capsys, "eval", "--checkpoint", checkpoint, "--data", str(tmp_path))
    assert f"{tmp_path}/val.bin holds token 258, vocab_size is 258" in said


@pytest.mark.filterwarnings("default:--text")
def test_characters_that_the_tokenizer_does_not_have_are_told(tmp_path, capsys):
    tiny(vocab_size=4).save_pretrained(tmp_path / "checkpoint")
    CharTokenizer("abc").save(tmp_path / "checkpoint")
    for text, said in (("abcabc", ""), ("ab€d", "no token for 2 of its characters, such as '€': all of them are one")):
        (tmp_path / "a.txt").write_text(text)
        options = ["--checkpoint", str(tmp_path / "checkpoint"), "--text", str(tmp_path / "a.txt")]
        assert cli.main(["eval", *options]) == 0
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_what_cannot_be_evaluated_is_named(tmp_path, capsys, checkpoint, prepared):
    ByteTokenizer().save(tmp_path / "prepared")
    np.zeros(9, np.uint16).tofile(tmp_path / "val.bin")
    for options, message in (
        ([], "nothing to evaluate"),
        (["--hellaswag", "missing.jsonl"], "missing.jsonl"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--data", "missing"], "missing"),
        (["--data", prepared], "another tokenizer"),
        (["--data", str(tmp_path)], f"{tmp_path / 'val.bin'} has 9 tokens, one window of block_size 16 needs one more"),
        (["--data", prepared, "--tokens", "0"], "--tokens is 0"),
        (["--text", str(tmp_path / "text.txt"), "--stride", "17"], "stride is 17, allowed are 1..16"),
    ):
        capsys.readouterr()
        assert message in failed(capsys, "eval", "--checkpoint", checkpoint, *options)
