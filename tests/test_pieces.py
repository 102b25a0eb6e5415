"""Text that comes token by token: characters stay whole, and the stop string stays out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.gpt2.data.pieces import Pieces
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b"ab": 256, b"\xc3\xa9a": 257, b"\xe2\x82": 258})
TOKENIZERS = [ByteTokenizer(), BPE, CharTokenizer("abé€\U0001f600")]
IDS = ["byte", "bpe", "char"]


def fed(tokenizer, tokens, stop=None):
    text = Pieces(tokenizer, stop)
    pieces = [*(text.add(int(token)) for token in tokens), text.finish()]
    assert "".join(pieces) == text.text
    return text, pieces


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=IDS)
@given(text=st.text("abé€\U0001f600"))
def test_a_character_is_never_split(tokenizer, text):
    tokens = tokenizer.encode(text)
    out, pieces = fed(tokenizer, tokens)
    assert out.text == text and out.tokens == len(tokens) and out.ended is None
    assert "\ufffd" not in "".join(pieces[:-1])


@given(st.lists(st.integers(0, 258)))
def test_any_bytes_are_what_decode_makes_of_them(tokens):
    assert fed(BPE, tokens)[0].text == BPE.decode(tokens)
    single = [t % 256 for t in tokens]
    assert fed(ByteTokenizer(), single)[0].text == ByteTokenizer().decode(single)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=IDS)
@given(text=st.text("abé", max_size=12), stop=st.text("abé", min_size=1, max_size=3))
def test_a_text_ends_before_the_stop_string(tokenizer, text, stop):
    out, pieces = fed(tokenizer, tokenizer.encode(text), stop)
    before, found, _ = text.partition(stop)
    assert out.text == before and (out.ended == "stop") == bool(found)
    for i in range(len(pieces)):
        assert text.startswith("".join(pieces[:i]))


def test_pieces_come_as_soon_as_they_are_certain():
    assert fed(ByteTokenizer(), "aé".encode())[1] == ["a", "", "é", ""]
    assert fed(ByteTokenizer(), b"aabac", "abc")[1] == ["", "a", "", "ab", "ac", ""]


def test_nothing_follows_the_end_of_text():
    out, pieces = fed(BPE, [97, 0xC3, BPE.end_of_text, 98])
    assert out.text == "a\ufffd" and out.ended == "end_of_text" and out.tokens == 3
    out, _ = fed(BPE, [97, BPE.end_of_text], stop="abc")
    assert out.text == "a" and out.ended == "end_of_text"


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="stop is empty"):
        Pieces(BPE, "")
