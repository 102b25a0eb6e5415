"""What a run trains on: text or shards, told apart, and shards with the tokenizer that made them."""

import dataclasses

import numpy as np
import pytest
import test_shards
from test_shards import TOKENS, write_llmc, write_nanogpt, write_prepared
from tiny_run import TINY, run

from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer


def test_text_is_encoded_and_split(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    corpus = load_corpus(str(tmp_path), "char", 0.1, block_size=8)
    assert isinstance(corpus.tokenizer, CharTokenizer) and corpus.n_documents == 1
    assert (len(corpus.train), len(corpus.val)) == (270, 30) and set(corpus.train) == {1, 2, 3}
    assert load_corpus(None, "byte", 0.1, block_size=8).prompt == "def "


def test_prepared_shards_bring_their_tokenizer(tmp_path):
    manifest = write_prepared(tmp_path)
    BPETokenizer({bytes([b]): b for b in range(256)} | {b"he": 256}).save(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train_.\.npy holds token .*, vocab_size is 258"):
        load_corpus(str(tmp_path), None, 0.1, block_size=8)
    dataclasses.replace(manifest, train=manifest.train[:0]).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="lists no train shard"):
        load_corpus(str(tmp_path), None, 0.1, block_size=8)


def test_shards_without_a_tokenizer_need_its_name(tmp_path, monkeypatch):
    write_nanogpt(tmp_path)
    with pytest.raises(ValueError, match="tokens without their tokenizer.*such as gpt2"):
        load_corpus(str(tmp_path), "char", 0.1, block_size=8)
    with pytest.raises(ValueError, match="holds token .*, vocab_size is 256"):
        load_corpus(str(tmp_path), "byte", 0.1, block_size=8)
    vocabulary = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 50256))))
    monkeypatch.setattr(tokenizers, "gpt2", lambda: vocabulary)
    corpus = load_corpus(str(tmp_path), "gpt2", 0.1, block_size=8)
    assert corpus.tokenizer is vocabulary and corpus.n_documents is None
    assert (corpus.train[:] == TOKENS).all() and (corpus.val[:] == TOKENS[:100]).all()


@pytest.mark.parametrize("write", [write_nanogpt, write_llmc, write_prepared])
def test_training_reads_shards(tmp_path, monkeypatch, write):
    monkeypatch.setattr(test_shards, "TOKENS", (TOKENS % 256).astype(np.uint16))
    write(tmp_path)
    ByteTokenizer().save(tmp_path)
    settings = {**TINY, "data": str(tmp_path), "out": str(tmp_path / "run"), "tokenizer": None}
    result, log, said = run(settings, steps=2)
    assert result.steps == 2 and result.model.config.vocab_size == 256 and "1,000 tokens and 100 held out" in said
    assert len(log) == 2


def test_shards_too_short_or_given_as_a_file_are_named(tmp_path):
    (TOKENS % 256).tofile(tmp_path / "train.bin")
    (TOKENS[:9] % 256).tofile(tmp_path / "val.bin")
    ByteTokenizer().save(tmp_path)
    val = tmp_path / "val.bin"
    for given, message in ((tmp_path, "has 9 tokens, one window of block_size 16"), (val, "is a file")):
        with pytest.raises(ValueError, match=f"{val} {message}"):
            run({**TINY, "out": str(tmp_path / "run")}, data=str(given))
    assert not (tmp_path / "run").exists()
