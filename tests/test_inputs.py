"""Data is what it is taken for: its tokenizer, its splits, its files as they were; nothing that was made from it."""

import dataclasses
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_shards import TOKENS, write_nanogpt, write_prepared
from tiny_run import TINY, finish, run

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data import shards, windows
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, is_named
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer

BYTES = (TOKENS % 256).astype(np.uint16)
BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b"he": 256})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)


@pytest.fixture
def byte_shards(tmp_path):
    """A folder of tokens in nanoGPT's form with the tokenizer of bytes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    BYTES.tofile(folder / "train.bin")
    BYTES[:200].tofile(folder / "val.bin")
    ByteTokenizer().save(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_a_name_means_a_tokenizer(tmp_path, monkeypatch):
    BPE.save(tmp_path)
    for spec, its in (("char", CharTokenizer("ab")), ("byte", ByteTokenizer()), (str(tmp_path), BPE)):
        for tokenizer in (CharTokenizer("ab"), ByteTokenizer(), BPE):
            assert is_named(spec, tokenizer) == (type(tokenizer) is type(its)), (spec, tokenizer)
    assert not is_named("gpt2", BPE) and not is_named("gpt2", ByteTokenizer())
    monkeypatch.setattr(tokenizers, "GPT2_VOCAB_SIZE", BPE.vocab_size)
    assert not is_named("gpt2", BPE)  # of GPT-2's size, with other words
    monkeypatch.setattr(tokenizers, "GPT2_SAYS", {"he": [256]})
    assert is_named("gpt2", BPE)


@pytest.mark.network
def test_gpt2s_vocabulary_is_named_gpt2():
    assert is_named("gpt2", tokenizers.gpt2())


@pytest.mark.parametrize("spec", ["char", "gpt2"])
def test_another_tokenizer_than_the_datas_is_refused(byte_shards, tmp_path, spec):
    settings = {**TINY, "data": str(byte_shards), "out": str(tmp_path / "run"), "steps": 1}
    with pytest.raises(ValueError, match=f"tokenizer is '{spec}', and .*shards was encoded by another one"):
        run(settings, tokenizer=spec)
    assert not (tmp_path / "run").exists()
    assert run(settings, tokenizer="byte", out=str(tmp_path / "named"))[0].model.config.vocab_size == 256
    result, *_ = run(settings, tokenizer=None)
    assert result.tokenizer == ByteTokenizer() and "tokenizer: null" in (result.folder / "config.yaml").read_text()


def test_a_preset_is_no_tokenizer_that_was_given(byte_shards, tmp_path):
    for preset, text_tokenizer in (("gpt2", "gpt2"), ("gpt2-smoke", "byte"), ("baby", "char"), ("baby-smoke", "char")):
        config = TrainConfig.from_preset(preset)
        assert (config.tokenizer, config.text_tokenizer()) == (None, text_tokenizer)
        corpus = load_corpus(str(byte_shards), None, 0.1, 8, text_tokenizer=text_tokenizer)
        assert corpus.tokenizer == ByteTokenizer()
    (tmp_path / "a.txt").write_text("abc" * 100)
    assert load_corpus(str(tmp_path / "a.txt"), None, 0.1, 8, text_tokenizer="byte").tokenizer == ByteTokenizer()


def test_another_tokenizer_than_the_checkpoints_is_refused(byte_shards, tmp_path):
    settings = {**TINY, "data": str(byte_shards), "out": str(tmp_path / "run"), "steps": 2}
    folder = run(settings)[0].folder
    with pytest.raises(ValueError, match="tokenizer is 'char', but .*step-00000002 has another one"):
        load_checkpoint(folder, tokenizer_spec="char")
    assert load_checkpoint(folder, tokenizer_spec="byte")[1] == ByteTokenizer()


def test_on_resume_the_tokens_mean_what_they_meant(byte_shards, tmp_path):
    settings = {**TINY, "data": str(byte_shards), "out": str(tmp_path / "run"), "steps": 2, "tokenizer": None}
    folder = run(settings)[0].folder
    CharTokenizer("".join(map(chr, range(1, 256)))).save(byte_shards)  # as many tokens, which mean something else
    with pytest.raises(ValueError, match="tokens of another tokenizer than the data's"):
        finish(None, resume=folder)


def test_a_prompt_of_the_corpus_is_in_its_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    assert load_corpus(str(tmp_path / "a.txt"), "char", 0.1, 8).prompt == "a"
    assert load_corpus(str(tmp_path / "a.txt"), "byte", 0.1, 8).prompt == "\n"
    (tmp_path / "a.txt").write_text("abc\n" * 100)
    assert load_corpus(str(tmp_path / "a.txt"), "char", 0.1, 8).prompt == "\n"


# ---------------------------------------------------------------------------------------------------- sources change


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"some text of {name}\n" * 50)
    return folder


def edited(file):
    """The same size, another content, a later time."""
    stat = file.stat()
    file.write_text(file.read_text().upper())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: edited(folder / "b.txt"), "b.txt was changed since .*out was begun"),
        (lambda folder: (folder / "a.txt").rename(folder / "c.txt"), "a.txt is gone since"),
        (lambda folder: (folder / "d.txt").write_text("more"), "d.txt is new since"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_source_that_changed_is_named(texts, tmp_path, change, said, finished):
    def stop(*args):
        raise KeyboardInterrupt

    options = dict(processes=1, shard_tokens=100)
    if finished:
        prepare(find_source(texts), tmp_path / "out", "byte", **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare(find_source(texts), tmp_path / "out", "byte", **options, report=stop)
    change(texts)
    with pytest.raises(ValueError, match=said):
        prepare(find_source(texts), tmp_path / "out", "byte", **options)


def test_a_source_that_changes_while_it_is_read_is_not_finished(texts, tmp_path):
    with pytest.raises(ValueError, match="a.txt was changed since"):
        prepare(find_source(texts), tmp_path / "out", "byte", processes=1, report=lambda *a: edited(texts / "a.txt"))
    assert shards.read_manifest(tmp_path / "out").position is not None


def test_a_vocabulary_that_changed_is_refused(texts, tmp_path):
    BPE.save(tmp_path / "vocabulary")
    prepare(find_source(texts), tmp_path / "out", str(tmp_path / "vocabulary"), processes=1)
    ByteTokenizer().save(tmp_path / "vocabulary")
    with pytest.raises(ValueError, match="was begun with another vocabulary than .*vocabulary holds now"):
        prepare(find_source(texts), tmp_path / "out", str(tmp_path / "vocabulary"), processes=1)


# --------------------------------------------------------------------------------------------------- a run's data


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_on_resume_every_token_counts(byte_shards, tmp_path, name):
    settings = {**TINY, "data": str(byte_shards), "out": str(tmp_path / "run"), "steps": 2}
    folder = run(settings)[0].folder
    finish(None, resume=folder)
    before = np.fromfile(byte_shards / name, np.uint16)
    changed = before.copy()
    changed[len(changed) // 3 + 1] ^= 1
    changed.tofile(byte_shards / name)
    what = "the data" if name == "train.bin" else "the held-out data"
    with pytest.raises(ValueError, match=f"content of {what} is"):
        finish(None, resume=folder)
    before[:-1].tofile(byte_shards / name)
    with pytest.raises(ValueError, match=f"tokens of {what} is"):
        finish(None, resume=folder)


def test_every_token_is_part_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 64)
    found = {windows.content(TOKENS)}
    for at in (0, 63, 64, 500, 999):
        changed = TOKENS.copy()
        changed[at] ^= 1
        found |= {windows.content(changed)}
    assert len(found) == 6
    assert windows.content(TOKENS.astype(np.uint32)) == windows.content(TOKENS)
    parts = windows.content(shards.Shards([TOKENS[:10], TOKENS[10:]]))
    assert parts != windows.content(shards.Shards([TOKENS[:10], changed[10:]]))


def test_the_content_of_prepared_shards_is_known_without_reading(tmp_path, monkeypatch):
    manifest = write_prepared(tmp_path)
    monkeypatch.setattr(shards, "array_content", lambda tokens: 1 / 0)
    content = shards.open_tokens(tmp_path, "train").content()
    other = dataclasses.replace(manifest, train=manifest.train[:2])
    other.save(tmp_path)
    assert shards.open_tokens(tmp_path, "train").content() != content


# ---------------------------------------------------------------------------------------------------------- splits


def test_a_split_is_a_word_of_a_name(tmp_path):
    names = {
        "medieval_train.bin": "train", "trained_val.npy": "val", "Train.bin": "train", "fineweb_val_000001.bin": "val",
        "TinyStoriesTrain.npy": "train", "x-validation.bin": "val", "VAL.bin": "val", "meta.bin": None,
    }  # fmt: skip
    for name in names:
        np.save(tmp_path / name, BYTES) if name.endswith("npy") else BYTES.tofile(tmp_path / name)
    for split in shards.SPLITS:
        found = {Path(name).name for name in shards.open_tokens(tmp_path, split).names}
        assert found == {name for name, its in names.items() if its == split}


@pytest.mark.parametrize("name", ["train_val.bin", "trainset.bin", "interval.npy"])
def test_a_name_that_may_be_both_is_refused(tmp_path, name):
    write_nanogpt(tmp_path)
    (tmp_path / name).write_bytes(BYTES.tobytes())
    with pytest.raises(ValueError, match=f"{name} may be train or val"):
        shards.open_tokens(tmp_path, "train")


def test_a_folder_of_texts_is_no_shards_for_one_bin(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    BYTES.tofile(tmp_path / "data.bin")
    assert not shards.holds_tokens(tmp_path)
    with pytest.raises(ValueError, match="is a folder of text, and .*data.bin looks like tokens"):
        load_corpus(str(tmp_path), "char", 0.1, 8)
    (tmp_path / "data.bin").unlink()
    assert load_corpus(str(tmp_path), "char", 0.1, 8).n_documents == 1
    write_nanogpt(tmp_path)  # as in nanoGPT's own folders, where input.txt lies beside
    assert shards.holds_tokens(tmp_path)


# ------------------------------------------------------------------------------------------------------ its own output


def test_training_in_the_folder_of_its_text_does_not_read_its_runs(texts, monkeypatch):
    monkeypatch.chdir(texts)
    settings = {**TINY, "data": ".", "out": None, "steps": 1}
    first = run(settings)[0]
    with pytest.warns(UserWarning, match=rf"{first.folder} was written by fastgpt2 and is no part of \."):
        corpus = load_corpus(".", "byte", 0.1, 8)
    assert corpus.n_documents == 2
    with pytest.raises(ValueError, match="was written by fastgpt2 train or prepare: give a folder of text"):
        load_corpus(str(first.folder), "byte", 0.1, 8)


@pytest.mark.filterwarnings("ignore:.*was written by fastgpt2")
def test_preparing_into_the_folder_of_the_text_does_not_read_the_shards(texts, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    inside = dict(out=texts / "out", tokenizer="byte", processes=1, shard_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        prepare(find_source(texts), **inside, report=stop)
    manifest = prepare(find_source(texts), **inside)
    assert manifest == prepare(find_source(texts), **inside) and manifest.n_documents == 2
    (texts / "out" / ".fastgpt2.lock").unlink()  # also without the lock it is known
    assert len(find_source(texts).files) == 2
    shutil.copytree(texts / "out", tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_corpus(str(tmp_path / "copy"), None, 0.1, 8).n_documents == 2


@pytest.mark.filterwarnings("default:.*was written by fastgpt2")
def test_the_command_says_what_it_leaves_out(texts, capsys):
    options = ["prepare", "--source", str(texts), "--tokenizer", "byte", "--processes", "1", "--out"]
    assert cli.main([*options, str(texts / "out")]) == 0 and capsys.readouterr().err == ""
    assert cli.main([*options, str(texts / "out2")]) == 0
    assert capsys.readouterr().err == (
        f"fastgpt2: warning: {texts / 'out'} was written by fastgpt2 and is no part of {texts}\n"
    )
