"""Text to tokens and back, and vocabularies in every format that they come in."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "hello, the hello\n  world's 123 -- héllo 日本語 🙂\n\n\tdef f(x):  return x\n"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
# Byte 104 is "h"; a vocabulary of 256 bytes in GPT-2's order and six merges.
ORDER = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
ORDER += [b for b in range(256) if b not in ORDER]
MERGES = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"), (b" ", b"w"), (b"\xc3", b"\xa9")]
RANKS = {bytes([b]): i for i, b in enumerate(ORDER)} | {a + b: 256 + i for i, (a, b) in enumerate(MERGES)}


def printable(token: bytes) -> str:
    return "".join(chr(b) if ORDER.index(b) < 188 else chr(256 + ORDER.index(b) - 188) for b in token)


@pytest.fixture(params=["char", "byte", "bpe"])
def tokenizer(request):
    if request.param == "char":
        return CharTokenizer.from_text([TEXT], coverage=1.0)
    return ByteTokenizer() if request.param == "byte" else BPETokenizer(RANKS)


@pytest.fixture
def hf_folder(tmp_path):
    """vocab.json and merges.txt as OpenAI's GPT-2 has them."""
    vocab = {printable(token): rank for token, rank in RANKS.items()} | {"<|endoftext|>": len(RANKS)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(f"{printable(a)} {printable(b)}" for a, b in MERGES)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return tmp_path


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


@given(UNICODE)
def test_any_text_comes_back(text):
    for tokenizer in (ByteTokenizer(), BPETokenizer(RANKS), CharTokenizer("".join(sorted(set(text) - {"\ufffd"})))):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_refuses_what_is_no_token(tokenizer):
    V = tokenizer.vocab_size
    for wrong in (-1, V):
        with pytest.raises(ValueError, match=rf"token {wrong}, allowed are 0\.\.{V - 1}"):
            tokenizer.decode([0, wrong])


def test_saved_tokenizer_is_read_back_here_and_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    ids = tokenizer.encode(TEXT).tolist()
    ours = tokenizers.load(tmp_path)
    assert type(ours) is type(tokenizer) and ours.vocab_size == tokenizer.vocab_size
    assert ours.encode(TEXT).tolist() == ids and ours.end_of_text == tokenizer.end_of_text
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT).input_ids == ids and theirs.decode(ids) == TEXT
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.end_of_text


# -------------------------------------------------------------------------------------------------- characters


def test_rare_characters_are_one_unknown_token():
    text = "ab" * 10_000 + "é"
    tokenizer = CharTokenizer.from_text([text[:100], text[100:]])
    assert tokenizer.characters == "ab" and tokenizer.vocab_size == 3
    assert tokenizer.encode("aéb日").tolist() == [1, 0, 2, 0]
    assert tokenizer.decode([1, 0, 2]) == "a\ufffdb"


def test_most_of_any_text_is_known():
    # 3000 characters, all equally frequent: a vocabulary cut at a fixed size would lose them.
    text = "".join(chr(0x4E00 + i) for i in range(3000)) * 5
    tokenizer = CharTokenizer.from_text([text[:100], text[100:]])
    assert (tokenizer.encode(text) == 0).mean() <= 1e-4


def test_vocabularies_beyond_16_bits_are_wider():
    tokenizer = CharTokenizer("".join(chr(c) for c in range(0x10000, 0x20010)))
    assert tokenizer.encode(chr(0x2000F)).tolist() == [0x10010]
    assert tokenizers.token_dtype(2**16) is np.uint16 and tokenizers.token_dtype(2**16 + 1) is np.uint32


def test_characters_twice_are_refused():
    with pytest.raises(ValueError, match="twice"):
        CharTokenizer("aba")


# ---------------------------------------------------------------------------------------------- byte-pair encoding


def test_merges_are_applied_in_order():
    tokenizer = BPETokenizer(RANKS)
    assert tokenizer.vocab_size == 263 and tokenizer.end_of_text == 262
    assert tokenizer.encode("hello").tolist() == [259]
    assert tokenizer.encode("hell ll w").tolist() == [258, RANKS[b" "], 257, 260]
    assert tokenizer.decode([256, 262]) == "he<|endoftext|>"


def test_end_of_text_is_never_made_from_text():
    tokenizer = BPETokenizer(RANKS)
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")


def test_a_token_cut_in_two_is_shown_as_replacement():
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)})
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"


def test_a_vocabulary_without_merges_keeps_its_end_of_text(tmp_path):
    BPETokenizer({bytes([b]): b for b in range(256)}).save(tmp_path)
    assert tokenizers.load(tmp_path).end_of_text == 256


def test_every_format_is_the_same_vocabulary(hf_folder, tmp_path):
    from_merges = tokenizers.load(hf_folder)
    file = tmp_path / "gpt2.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(t) + f" {r}\n".encode() for t, r in RANKS.items()))
    assert from_merges.ranks == tokenizers.from_ranks_file(file).ranks == RANKS
    BPETokenizer(from_merges.ranks).save(hf_folder)
    assert {f.name for f in hf_folder.glob("*.*")} == {"tokenizer.json", "tokenizer_config.json", "gpt2.tiktoken"}
    assert tokenizers.load(hf_folder).ranks == RANKS
    saved = json.loads((hf_folder / "tokenizer.json").read_text("utf-8"))
    assert saved["model"]["merges"] == [[printable(a), printable(b)] for a, b in MERGES]


def test_huggingfaces_own_file_is_read(tmp_path):
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    assert ours.end_of_text == theirs.token_to_id("<|endoftext|>")


# ----------------------------------------------------------------------------------------------------- bad files


def _model(tmp_path, **model):
    content = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        (lambda p: (p / "tokenizer.json").write_text("[]"), "holds no JSON object"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "no tokenizer that can be used"),
        (lambda p: _model(p, type="Unigram", vocab=[]), "no tokenizer that can be used"),
        (lambda p: _model(p, type="WordLevel", vocab={"a": 0}), "missing field `unk_token`"),
        (lambda p: _model(p, type="BPE", vocab={"a": "b"}, merges=[]), "no tokenizer that can be used"),
        (lambda p: _library_file(p, {"a": 0}), "no token for byte 33"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def _library_file(folder, vocab):
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.save(str(folder / "tokenizer.json"))


def test_a_damaged_vocabulary_is_named(hf_folder):
    vocab = json.loads((hf_folder / "vocab.json").read_text())
    merges = (hf_folder / "merges.txt").read_text("utf-8").splitlines()
    for content, lines, message in (
        ({k: v for k, v in vocab.items() if k != "h"}, merges, "`h`"),
        ({k: v for k, v in vocab.items() if k != printable(b"\0")}, merges, "no token for byte 0"),
        (vocab, [*merges, "a b c d"], "invalid at line 7"),
        ([1], merges, "holds no JSON object"),
    ):
        (hf_folder / "vocab.json").write_text(json.dumps(content))
        (hf_folder / "merges.txt").write_text("\n".join(lines), "utf-8")
        with pytest.raises(ValueError, match=message) as error:
            tokenizers.load(hf_folder)
        assert "vocab.json" in str(error.value)


def test_a_folder_without_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json.*vocab.json.*merges.txt"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"aGU= 0\nnonsense\n", "line 2"), (b"aGU= 0\n", "byte 0"), (b"a!== 0\n", "line 1")],
)
def test_a_ranks_file_that_is_none_is_named(tmp_path, content, message):
    file = tmp_path / "ranks.tiktoken"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.from_ranks_file(file)
    assert str(file) in str(error.value)


def test_gaps_in_ranks_are_refused():
    with pytest.raises(ValueError, match=r"not numbered 0\.\.256"):
        BPETokenizer({bytes([b]): b for b in range(256)} | {b"ab": 300})


# ---------------------------------------------------------------------------------------------- OpenAI's vocabulary


def test_gpt2_comes_from_huggingfaces_cache(monkeypatch, hf_folder):
    tokenizers.load(hf_folder).save(hf_folder)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(hf_folder / file))
    assert tokenizers.gpt2().ranks == RANKS


def test_gpt2_comes_from_tiktoken(monkeypatch):
    import tiktoken

    special = {"<|endoftext|>": len(RANKS)}
    encoding = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=RANKS, special_tokens=special)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr("tiktoken.get_encoding", {"gpt2": encoding}.__getitem__)
    assert tokenizers.gpt2().ranks == RANKS


def test_gpt2_offline_says_how_to_provide_it(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(
        OSError, match="ConnectionError: no route to host.*--tokenizer FOLDER.*merges.txt.*--tokenizer"
    ) as e:
        tokenizers.gpt2()
    assert e.value.__suppress_context__, "one error, not a chain of them"


@pytest.mark.network
def test_gpt2s_vocabulary_is_openais():
    try:
        tokenizer = tokenizers.gpt2()
    except OSError as error:
        pytest.skip(str(error))
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
