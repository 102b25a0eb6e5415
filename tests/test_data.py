"""Text sources, and the tokens made from them."""

import sys

import numpy as np
import pytest

from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt2.gpt2.data.windows import check_tokens, encode, read_text, split

# ---------------------------------------------------------------------------------------------------------- text


def test_the_default_is_real_text_on_every_machine():
    text = read_text()
    assert sum(map(len, text.documents)) > 1_000_000 and sys.version.split()[0] in text.name
    assert any("class ArgumentParser(" in d for d in text.documents)


@pytest.mark.parametrize("content", ["", "\ufeff"])
def test_a_source_without_text_is_refused(tmp_path, content):
    for name in ("one", "two"):
        (tmp_path / name).write_text(content, "utf-8")
    for path in (tmp_path, tmp_path / "one"):
        with pytest.raises(ValueError, match=f"{path} holds no text"):
            read_text(path)


def test_a_large_source_is_not_read_into_memory():
    with pytest.raises(ValueError, match="fineweb-edu.*fastgpt2 prepare"):
        read_text("fineweb-edu")


# -------------------------------------------------------------------------------------------------------- tokens


def test_documents_end_with_the_end_of_text():
    pieces = [("ab", True), ("c", False), ("d", True)]
    bpe = BPETokenizer({bytes([b]): b for b in range(256)})
    assert encode(pieces, bpe).tolist() == [97, 98, 256, 99, 100, 256]
    tokens = encode(pieces, ByteTokenizer())
    assert tokens.tolist() == [97, 98, 99, 100] and tokens.dtype == np.uint16
    assert encode([], bpe).shape == (0,)


def test_tokens_beyond_the_vocabulary_are_refused():
    check_tokens(np.array([0, 9], np.uint16), vocab_size=10)
    with pytest.raises(ValueError, match="token 10, vocab_size is 10"):
        check_tokens(np.array([3, 10], np.uint16), vocab_size=10)


def test_the_end_is_held_out():
    train, val = split(np.arange(1000), 0.1, block_size=8)
    assert train.tolist() == list(range(900)) and val.tolist() == list(range(900, 1000))
    # A tenth of 50 tokens is less than one window of 8 and the token after it.
    train, val = split(np.arange(50), 0.1, block_size=8)
    assert len(val) == 9 and len(train) == 41
    split(np.arange(18), 0.1, block_size=8)
    with pytest.raises(ValueError, match="17 tokens.*block_size 8 need at least 18"):
        split(np.arange(17), 0.1, block_size=8)
