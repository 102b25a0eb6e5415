"""Token shards: ours and three other projects', and what is wrong with damaged ones."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.gpt2.data import shards
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.shards import Manifest, Shards, holds_tokens, open_tokens
from fastgpt2.gpt2.data.windows import check_tokens, eval_batches

TOKENS = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)


def llmc(tokens, magic=20240520, version=1, count=None) -> bytes:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def write_prepared(folder, cuts=(300, 301), dtype=np.uint16):
    """What `fastgpt2 prepare` leaves: TOKENS as three training shards and the first tenth as validation."""
    parts = np.split(TOKENS.astype(dtype), cuts)
    train = tuple(shards.write_shard(folder, f"train_{i}.npy", part) for i, part in enumerate(parts))
    val = (shards.write_shard(folder, "val_0.npy", TOKENS[:100].astype(dtype)),)
    manifest = Manifest(source={"name": "test"}, vocab_size=50257, end_of_text=50256, train=train, val=val)
    manifest.save(folder)
    return manifest


def write_nanogpt(folder):
    TOKENS.tofile(folder / "train.bin")
    TOKENS[:100].tofile(folder / "val.bin")


def write_build_nanogpt(folder):
    np.save(folder / "edufineweb_train_000001.npy", TOKENS[:400])
    np.save(folder / "edufineweb_train_000002.npy", TOKENS[400:])
    np.save(folder / "edufineweb_val_000000.npy", TOKENS[:100])


def write_llmc(folder):
    (folder / "fineweb_train_000001.bin").write_bytes(llmc(TOKENS[:400]))
    (folder / "fineweb_train_000002.bin").write_bytes(llmc(TOKENS[400:]))
    (folder / "fineweb_val_000000.bin").write_bytes(llmc(TOKENS[:100]))


@pytest.mark.parametrize("write", [write_prepared, write_nanogpt, write_build_nanogpt, write_llmc])
def test_every_format_is_one_long_array(tmp_path, write):
    assert not holds_tokens(tmp_path)
    write(tmp_path)
    assert holds_tokens(tmp_path) and not holds_tokens(tmp_path / "train.bin")
    train, val = (open_tokens(tmp_path, split) for split in shards.SPLITS)
    assert (train[:] == TOKENS).all() and train[:].dtype == np.uint16 and (val[:] == TOKENS[:100]).all()
    assert all(isinstance(part, np.memmap) for part in train.parts)
    assert max(train.maxima()) == TOKENS.max() and list(val.maxima()) == [TOKENS[:100].max()]
    at = int(np.argmax([TOKENS.max() in part for part in train.parts]))
    with pytest.raises(ValueError, match=f"{train.names[at]} holds token {TOKENS.max()}, vocab_size is {TOKENS.max()}"):
        check_tokens(train, int(TOKENS.max()))
    check_tokens(train, int(TOKENS.max()) + 1)


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_slices_cross_shards_as_if_there_were_one(cuts, start, stop):
    tokens = np.arange(50, dtype=np.uint16)
    found = Shards(np.split(tokens, sorted(cuts)))[start:stop]
    assert found.dtype == np.uint16 and found.tolist() == tokens[start:stop].tolist()


def test_slices_have_no_steps():
    with pytest.raises(ValueError, match="step is 2"):
        Shards([TOKENS])[::2]


def test_large_vocabularies_take_four_bytes(tmp_path):
    write_prepared(tmp_path, dtype=np.uint32)
    assert open_tokens(tmp_path, "train")[:].dtype == np.uint32


def test_the_manifest_comes_back(tmp_path):
    written = write_prepared(tmp_path)
    assert shards.read_manifest(tmp_path) == written and written.val[0].max_token == TOKENS[:100].max()


# --------------------------------------------------------------------------------------------------- ours, damaged


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / "train_1.npy").unlink(), FileNotFoundError, "train_1.npy is missing"),
        (lambda p: cut_short(p / "train_1.npy"), ValueError, "train_1.npy is cut short"),
        (lambda p: (p / "train_1.npy").write_bytes(b""), ValueError, "train_1.npy is an empty file"),
        (lambda p: np.save(p / "train_0.npy", TOKENS[:299]), ValueError, "holds 299 tokens, manifest.json says 300"),
        (lambda p: np.save(p / "train_0.npy", TOKENS[:300].astype(int)), ValueError, "holds int64 of shape"),
        (lambda p: flip_a_bit(p / "train_2.npy"), ValueError, "train_2.npy was changed: its SHA-256"),
        (lambda p: (p / "manifest.json").write_text("{}"), ValueError, "manifest.json is no manifest"),
        (lambda p: (p / "manifest.json").write_text("[1"), ValueError, "manifest.json is no manifest"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, error, message):
    write_prepared(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as raised:
        open_tokens(tmp_path, "train")
    assert str(tmp_path) in str(raised.value)
    if "train_" in message:
        open_tokens(tmp_path, "val")


def test_a_folder_that_is_not_finished_or_not_there_is_refused(tmp_path):
    manifest = write_prepared(tmp_path)
    dataclasses.replace(manifest, position={"batch": 1}).save(tmp_path)
    with pytest.raises(ValueError, match="not finished.*fastgpt2 prepare"):
        open_tokens(tmp_path, "train")
    dataclasses.replace(manifest, val=()).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="lists no val shard"):
        open_tokens(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_tokens(tmp_path / "none", "train")


def test_ranks_share_the_comparison_of_checksums(tmp_path):
    write_prepared(tmp_path)
    flip_a_bit(tmp_path / "train_1.npy")
    for rank in range(3):
        if rank == 1:
            with pytest.raises(ValueError, match="train_1.npy was changed"):
                open_tokens(tmp_path, "train", rank=rank, world_size=3)
        else:
            assert len(open_tokens(tmp_path, "train", rank=rank, world_size=3)) == 1000


# ------------------------------------------------------------------------------------------------- others, damaged


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.bin", b"", "empty file"),
        ("train.bin", b"abc", "cut short.*3 bytes"),
        ("train.bin", llmc(TOKENS, magic=20240801), "header with magic 20240801.*expected llm.c's 20240520"),
        ("train.bin", llmc(TOKENS, version=7), "version 7; expected"),
        ("train.bin", llmc(TOKENS, count=1001), "holds 1000 tokens, its header says 1001"),
        ("train.bin", llmc(TOKENS)[:512], "cut short: 512 bytes, its header alone has 1024"),
        ("train.bin", llmc(TOKENS[:0]), "holds no tokens"),
        ("train.npy", b"not numpy", "cut short, or no .npy file"),
    ],
)
def test_a_damaged_file_of_others_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_tokens(tmp_path, "train")
    assert str(tmp_path / name) in str(raised.value)


def test_a_folder_of_tokens_without_a_split_is_no_text(tmp_path):
    (tmp_path / "data.bin").write_bytes(TOKENS.tobytes())
    with pytest.raises(FileNotFoundError, match="no train tokens: expected manifest.json, or files .*train"):
        load_corpus(str(tmp_path), "byte", 0.1, 8)


def test_a_split_that_is_too_short_is_named(tmp_path):
    for name, tokens in (("train.npy", TOKENS), ("val.npy", TOKENS[:8])):
        np.save(tmp_path / name, tokens)
    with pytest.raises(ValueError, match="val.npy has 8 tokens, one window of block_size 8 needs one more"):
        next(eval_batches(open_tokens(tmp_path, "val"), 8, 1, 1))


def test_a_folder_without_shards_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no val tokens: expected manifest.json, or files .*val"):
        open_tokens(tmp_path, "val")
