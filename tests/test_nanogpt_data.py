"""nanoGPT's data sets of characters, with their vocabulary in meta.pkl, and the names of OpenAI's vocabulary."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from foreign_formats import write_llmc, write_nanogpt, write_openai
from hf_models import hf_gpt2
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import TINY, run
from transformers import AutoTokenizer

from fastgpt2 import GPT
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.nanogpt import KnownCharTokenizer, read_meta
from fastgpt2.gpt2.data.shards import open_tokens
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt2.gpt2.generation.sample import load_checkpoint

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 40
V = len(set(TEXT))


def prepare(folder, text=TEXT, protocol=None):
    """As data/shakespeare_char/prepare.py does."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = sorted(set(text))
    stoi, itos = {c: i for i, c in enumerate(chars)}, dict(enumerate(chars))
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_vocabulary_is_read_whatever_pickle_wrote_it(tmp_path, protocol):
    folder = prepare(tmp_path, TEXT + "é日🙂", protocol)
    for given_path in (folder, folder / "meta.pkl"):
        tokenizer = tokenizers.from_spec(str(given_path), [])
        assert tokenizer.decode(open_tokens(folder, "train")[:]) == TEXT[: len(TEXT + "é日🙂") * 9 // 10]
        assert tokenizer.encode("hear\nme é日🙂").tolist() == [tokenizer.characters.index(c) for c in "hear\nme é日🙂"]


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_comes_back_and_other_characters_are_refused(text):
    characters = "".join(sorted(set(text) - {"\ufffd"}))
    tokenizer = KnownCharTokenizer(characters)
    known = "".join(c for c in text if c in characters)
    assert tokenizer.decode(tokenizer.encode(known)) == known
    assert set(tokenizer.unknown(text + "\ufffd~")) == (set(text) | set("\ufffd~")) - set(characters)
    with pytest.raises(ValueError, match="the text holds '\ufffd', none of the vocabulary's"):
        tokenizer.encode(known + "\ufffd")


def test_it_is_saved_so_that_transformers_reads_it(tmp_path):
    tokenizer = tokenizers.load(prepare(tmp_path / "data"))
    tokenizer.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved") == tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode("hear me.\n") == tokenizer.encode("hear me.\n").tolist() and len(theirs) == V
    assert tokenizers.is_named("char", tokenizer) and not tokenizers.is_named("byte", tokenizer)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"stoi": {}, "itos": {}, "x": Dangerous()}), "it holds (GLOBAL|STACK_GLOBAL|REDUCE)"),
        (pickle.dumps({"stoi": {}, "itos": {}, "x": b"bytes"}), "it holds SHORT_BINBYTES"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "is it cut short"),  # a bytearray of 2^60 bytes
        (b"\x80\x04}r\xff\xff\xff\xff.", "it puts something at place"),
        (b"\x80\x04]" + b"(" * 5 + b"u.", "is it cut short"),
        (b"", "is it cut short"),
        (pickle.dumps({"itos": {0: "a"}}), "no dictionaries stoi and itos"),
        (pickle.dumps([1]), "no dictionaries stoi and itos"),
        (pickle.dumps({"stoi": {"a": 0}, "itos": {1: "a"}}), "itos does not give each of 0..0 one character"),
        (pickle.dumps({"stoi": {"ab": 0}, "itos": {0: "ab"}}), "one character"),
        (pickle.dumps({"stoi": {"a": 1}, "itos": {0: "a"}}), "do not belong together"),
        (pickle.dumps({"stoi": {"a": 0}, "itos": {0: "a"}, "vocab_size": 2}), "do not belong together"),
        (pickle.dumps({"stoi": {"a": 1}, "itos": {0: "a", 1: "a"}}), "characters holds one twice"),
    ],
)
def test_no_code_of_a_pickle_runs_and_others_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=f"meta.pkl.*{message}"):
        read_meta(tmp_path / "meta.pkl")
    assert os.listdir(tmp_path) == ["meta.pkl"]


def test_a_flipped_or_lost_byte_is_an_error_or_another_character(tmp_path):
    """A pickle has no checksum: where both dictionaries share a character's text, a flip makes it another one."""
    path = prepare(tmp_path) / "meta.pkl"
    content, right = path.read_bytes(), read_meta(path)
    for place in range(0, len(content), 5):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]):
            path.write_bytes(damaged)
            try:
                found = read_meta(path)
            except ValueError as error:
                assert "meta.pkl" in str(error)
            else:
                assert sum(a != b for a, b in zip(found.characters, right.characters, strict=True)) <= 1


# ----------------------------------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("quick_runs")
def test_a_run_on_nanogpts_data_has_its_tokens(tmp_path, capsys):
    data = prepare(tmp_path / "shakespeare_char")
    settings = {**TINY, "data": str(data), "out": str(tmp_path / "run"), "steps": 2, "tokenizer": None}
    result, _, _ = run(settings)
    assert result.model.config.vocab_size == V and load_checkpoint(result.folder)[1] == tokenizers.load(data)
    with pytest.raises(ValueError, match="tokenizer is 'byte', and .* was encoded by another one"):
        run({**settings, "tokenizer": "byte"})


def test_a_checkpoint_of_nanogpts_is_sampled_and_evaluated(tmp_path, capsys):
    data = prepare(tmp_path / "data")
    path = write_nanogpt(tmp_path / "out", hf_gpt2(vocab_size=V))
    (tmp_path / "a.txt").write_text(TEXT[:100])
    for given_path in (path, path.parent):
        checkpoint = ["--checkpoint", str(given_path)]
        sample = ["sample", *checkpoint, "--prompt", "hear", "--max-new-tokens", "5", "--tokenizer"]
        assert cli.main([*sample, str(data)]) == 0
        written = capsys.readouterr().out
        assert cli.main([*sample, str(data / "meta.pkl")]) == 0
        assert written == capsys.readouterr().out and "hear" in written
        assert cli.main(["sample", *checkpoint, "--prompt", "x"]) == 2
        assert f"its {V} tokens are not GPT-2's vocabulary: give its own, --tokenizer PATH" in capsys.readouterr().err
        assert cli.main([*sample, "char"]) == 2
        assert "tokenizer is 'char', whose characters are not known" in capsys.readouterr().err
        evaluate = ["eval", *checkpoint, "--data", str(data), "--tokenizer", str(data / "meta.pkl")]
        assert cli.main(evaluate) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["val"]["tokens"] > 0
    (path.parent / "meta.pkl").write_bytes((data / "meta.pkl").read_bytes())
    for given_path in (path, path.parent):
        checkpoint = ["--checkpoint", str(given_path)]
        assert cli.main(["eval", *checkpoint, "--data", str(data), "--text", str(tmp_path / "a.txt")]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"]["tokens"] == 99
        assert cli.main(["sample", *checkpoint, "--prompt", "hé"]) == 2
        assert "the text holds 'é'" in capsys.readouterr().err


def vocabulary(folder):
    """GPT-2's 256 bytes, one merge and the end of text, under OpenAI's names."""
    BPETokenizer({**{bytes([b]): b for b in range(256)}, b"he": 256}).save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "encoder.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 257}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def test_openais_folder_brings_its_vocabulary(tmp_path, capsys):
    folder = write_openai(tmp_path / "124M", hf_gpt2(vocab_size=258))
    vocabulary(folder)
    for given_path in (folder, folder / "model.ckpt.index"):
        model, tokenizer = load_checkpoint(given_path)
        assert isinstance(tokenizer, BPETokenizer) and tokenizer.end_of_text == 257 == model.config.vocab_size - 1
        assert tokenizer.encode("the").tolist() == [ord("t"), 256]
    assert cli.main(["sample", "--checkpoint", str(folder), "--prompt", "the", "--max-new-tokens", "4"]) == 0
    (folder / "vocab.bpe").write_text("#version: 0.2\nh q\n")
    with pytest.raises(ValueError, match="encoder.json and vocab.bpe are no GPT-2 vocabulary"):
        tokenizers.load(folder)


def test_llmcs_file_is_gpt2s_vocabulary_or_the_one_that_is_named(tmp_path):
    path = write_llmc(tmp_path / "a.bin", hf_gpt2(vocab_size=256))
    model, tokenizer = load_checkpoint(path, tokenizer_spec="byte")
    assert isinstance(tokenizer, ByteTokenizer) and isinstance(model, GPT)
    assert torch.equal(model.transformer.wte.weight, GPT.from_pretrained(path).transformer.wte.weight)
