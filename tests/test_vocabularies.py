"""Vocabularies of HuggingFace's `tokenizers` that are not GPT-2's form: read, saved as they were, streamed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data import vocabularies
from fastgpt2.gpt2.data.pieces import Pieces
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, LibraryTokenizer

TEXT = "hello, the hello\n  world's 123 -- héllo 日本語 🙂\n\n\tdef f(x):  return x\n"
END, PAD = "<|endoftext|>", "[PAD]"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_bpe(special_first):
    """Byte-level BPE with two special tokens, before all others or after them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"special_tokens": [PAD, END]} if special_first else {}
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=ALPHABET, show_progress=False, **special)
    made.train_from_iterator([TEXT * 3], trainer)
    made.add_special_tokens([PAD, END])
    return made


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT * 3], trainer)
    return made


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.train_from_iterator(
        [TEXT * 3], trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", PAD], show_progress=False)
    )
    return made


MAKERS = {
    "special first": lambda: byte_bpe(True),
    "[PAD] added": lambda: byte_bpe(False),
    "unigram": unigram,
    "words": word_piece,
}
ENDS = {"special first": END, "[PAD] added": END, "unigram": "</s>", "words": None}


def save_theirs(folder, made, end):
    """As transformers saves a tokenizer, with a chat template."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, model_max_length=77)
    theirs.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    theirs.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": end} if end else {}))
    return theirs


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    save_theirs(tmp_path / "theirs", MAKERS[kind](), ENDS[kind])
    return tmp_path / "theirs"


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_theirs_is_read_with_the_same_tokens(kind, folder):
    ours, theirs = tokenizers.load(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, LibraryTokenizer)
    ids = ours.encode(TEXT).tolist()
    assert ids == theirs(TEXT, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.end_of_text == theirs.eos_token_id and ours.vocab_size == len(theirs)
    for wrong in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"token {wrong}, allowed"):
            ours.decode([wrong])


def test_what_is_saved_is_what_was_read(folder, tmp_path):
    ours = tokenizers.load(folder)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "vocab.json").write_text("{}")  # another tokenizer's: it would be read in place of ours
    ours.save(tmp_path / "new")
    assert contents(tmp_path / "new") == contents(folder) and "chat_template.jinja" in contents(folder)
    assert tokenizers.load(tmp_path / "new") == ours
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template.startswith("{% for m")


def test_a_vocabulary_of_gpt2s_form_keeps_its_files_too(tmp_path):
    made = byte_bpe(False)
    vocab = json.loads(made.to_str())["model"]["vocab"] | {END: 300}
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    assert len(vocab) == 301
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(vocab))
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (old / "tokenizer_config.json").write_text('{"model_max_length": 1024, "errors": "replace"}')
    ours, theirs = tokenizers.load(old), GPT2TokenizerFast(str(old / "vocab.json"), str(old / "merges.txt"))
    assert isinstance(ours, BPETokenizer) and ours.end_of_text == theirs.eos_token_id == 300
    assert ours.encode(TEXT).tolist() == theirs(TEXT).input_ids
    ours.save(tmp_path / "new")
    assert contents(tmp_path / "new") == contents(old)

    theirs.add_special_tokens({"pad_token": PAD})
    theirs.save_pretrained(tmp_path / "padded")
    padded = tokenizers.load(tmp_path / "padded")
    assert padded.vocab_size == 302 and padded.end_of_text == 300 and padded.special_tokens[PAD] == 301
    assert padded.encode(TEXT).tolist() == ours.encode(TEXT).tolist()


def test_added_tokens_of_an_old_folder(tmp_path):
    test_a_vocabulary_of_gpt2s_form_keeps_its_files_too(tmp_path)
    (tmp_path / "old" / "added_tokens.json").write_text(json.dumps({PAD: 301}))
    assert tokenizers.load(tmp_path / "old").special_tokens == {END: 300, PAD: 301}
    (tmp_path / "old" / "added_tokens.json").write_text(json.dumps({PAD: 401}))
    with pytest.raises(ValueError, match=r"added_tokens.json gives '\[PAD\]' id 401, the next is 301"):
        tokenizers.load(tmp_path / "old")


# ----------------------------------------------------------------------------------------------- runs of older releases

SPLIT = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def old_file(folder, model, level=None, added=()):
    """tokenizer.json as release 0.1.0 wrote it, key by key."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    decoder = level or {"type": "Fuse"}
    rest = {"pre_tokenizer": level or SPLIT, "decoder": decoder, "model": model}
    content = {"version": "1.0", "added_tokens": list(added), **empty, **rest}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def test_tokenizers_of_older_runs_are_what_they_were(tmp_path):
    names = vocabularies.printable()
    vocab = {"\ufffd": 0, "a": 1, "é": 2, "\n": 3}
    old_file(tmp_path, {"type": "WordLevel", "vocab": vocab, "unk_token": "\ufffd"})
    assert tokenizers.load(tmp_path) == CharTokenizer("aé\n")

    model = {"type": "BPE", "vocab": {names[b]: b for b in range(256)}, "merges": []}
    old_file(tmp_path, model, {**LEVEL, "use_regex": False})
    assert tokenizers.load(tmp_path) == ByteTokenizer()

    ranks = {bytes([b]): 255 - b for b in range(256)} | {b"he": 256, b" w": 257}
    model = {"type": "BPE", "vocab": {"".join(names[b] for b in token): i for token, i in ranks.items()}}
    for merges in ([["h", "e"], [names[32], "w"]], ["h e", f"{names[32]} w"]):
        end = {"id": 258, "content": END, "special": True, **FLAGS}
        old_file(tmp_path, {**model, "merges": merges}, {**LEVEL, "use_regex": True}, [end])
        loaded = tokenizers.load(tmp_path)
        assert loaded == BPETokenizer(ranks) and loaded.encode("he w\xe9").tolist() == [256, 257, 60, 86]
        loaded.save(tmp_path / "next")
        assert contents(tmp_path / "next") == {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}


# ---------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("special_first", [True, False])
def test_a_special_token_is_read_when_it_is_asked_for(special_first):
    ours = LibraryTokenizer(byte_bpe(special_first), END)
    parts = [ours.encode("hello").tolist(), ours.encode(" the").tolist()]
    assert ours.end_of_text not in ours.encode(f"hello{END} the")
    assert ours.encode_with_special(f"hello{END} the").tolist() == [*parts[0], ours.end_of_text, *parts[1]]
    assert ours.encode_with_special(END).tolist() == [ours.end_of_text]
    assert ours.encode_with_special("hello").tolist() == parts[0]


def test_special_tokens_of_gpt2_and_of_tokenizers_without_them():
    bpe = BPETokenizer({bytes([b]): b for b in range(256)})
    assert bpe.encode_with_special(f"a{END}{END}b").tolist() == [97, 256, 256, 98]
    assert bpe.encode_with_special(f"a{END}").dtype == bpe.encode("a").dtype
    with pytest.raises(ValueError, match="has no special tokens"):
        CharTokenizer("abc").encode_with_special("a")


def test_characters_without_a_token_are_named():
    assert LibraryTokenizer(word_piece()).unknown("hello ж the Я") == "жЯ"
    assert LibraryTokenizer(byte_bpe(True), END).unknown("hello ж") == ""
    dropping = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # has no unknown token: what it lacks vanishes
    assert LibraryTokenizer(dropping).unknown("abc") == "c"


# ---------------------------------------------------------------------------------------------------------- streaming


def streamed(tokenizer, prompt, tokens):
    text = Pieces(tokenizer, prompt=prompt)
    pieces = [*(text.add(token) for token in tokens), text.finish()]
    assert "".join(pieces) == text.text
    return text.text


LIBRARY = {name: LibraryTokenizer(make()) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", LIBRARY)
@given(ids=st.lists(st.integers(0, 999), max_size=20), words=st.integers(0, 9))
@settings(deadline=None)
def test_pieces_are_what_the_tokens_add_to_the_prompts_text(name, ids, words):
    tokenizer = LIBRARY[name]
    ids = [i % tokenizer.vocab_size for i in ids]
    prompt = tokenizer.encode(" ".join(TEXT.split()[:words])).tolist()
    whole = tokenizer.decode([*prompt, *ids])
    before = tokenizer.decode(prompt)
    assert streamed(tokenizer, prompt, ids) == whole[len(before) :]


def test_a_word_after_the_prompt_keeps_its_space():
    tokenizer = LIBRARY["unigram"]
    prompt, more = tokenizer.encode("hello").tolist(), tokenizer.encode("the").tolist()
    assert tokenizer.decode(more) == "the" and streamed(tokenizer, prompt, more) == " the"


def test_a_character_is_never_split():
    tokenizer = LIBRARY["special first"]
    text = Pieces(tokenizer)
    pieces = [text.add(int(token)) for token in tokenizer.encode("ж🙂é")]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + text.finish() == "ж🙂é"
