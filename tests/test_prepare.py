"""From text to shards: the same files from any number of processes, and after a kill at any moment."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_sources import DOCUMENTS, from_hub, write_jsonl, write_parquet, write_texts

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.cli import prepare as prepare_command
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.data import shards, sources
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.data.tokenizer import BPETokenizer
from fastgpt2.gpt2.data.windows import encode

RANKS = {bytes([b]): b for b in range(256)} | {b"do": 256, b"cu": 257, b"docu": 258, b" l": 259}
SETTINGS = dict(shard_tokens=300, val_tokens=500, processes=1)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 60)


@pytest.fixture
def vocabulary(tmp_path):
    BPETokenizer(RANKS).save(tmp_path / "vocabulary")
    return str(tmp_path / "vocabulary")


@pytest.fixture
def source(tmp_path, small_pieces):
    write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)
    return find_source(tmp_path / "rows.jsonl")


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


# ------------------------------------------------------------------------------------------------- what it leaves


def test_shards_hold_every_token_in_order(tmp_path, source, vocabulary):
    manifest = prepare(source, tmp_path / "out", vocabulary, **SETTINGS)
    expected = encode([(d, True) for d in DOCUMENTS], BPETokenizer(RANKS))
    assert (expected == 260).sum() == manifest.n_documents == len(DOCUMENTS)
    val, train = (shards.open_tokens(tmp_path / "out", split) for split in ("val", "train"))
    assert np.array_equal(np.concatenate([val[:], train[:]]), expected) and len(val) == 500
    assert [len(part) for part in val.parts] == [300, 200]
    assert {len(part) for part in train.parts[:-1]} == {300} and 0 < len(train.parts[-1]) <= 300
    assert manifest == shards.read_manifest(tmp_path / "out") and manifest.end_of_text == 260
    corpus = load_corpus(str(tmp_path / "out"), None, 0.5, block_size=8)
    assert corpus.tokenizer.decode(corpus.val[:12]) == BPETokenizer(RANKS).decode(expected[:12])


def test_a_tenth_of_the_first_shard_is_held_out_by_default(tmp_path, source):
    total = sum(map(len, DOCUMENTS))
    for name, shard, expected in (("a", 10**6, total // 10), ("b", 200, 20)):
        manifest = prepare(source, tmp_path / name, "byte", shard_tokens=shard, processes=1)
        assert sum(s.tokens for s in manifest.val) == expected
        assert sum(s.tokens for s in manifest.train) == total - expected


@pytest.mark.parametrize("spec", ["char", "byte"])
def test_the_other_tokenizers(tmp_path, source, spec):
    prepare(source, tmp_path / "out", spec, **SETTINGS)
    made = tokenizers.load(tmp_path / "out")
    val = shards.open_tokens(tmp_path / "out", "val")[:]
    assert made.decode(val) == "".join(DOCUMENTS)[:500]


@pytest.mark.slow  # also seen by test_a_command_that_was_killed_goes_on, which goes on with another number
def test_the_number_of_processes_changes_nothing(tmp_path, source, vocabulary):
    reported = []
    for processes in (1, 2):
        out, said = tmp_path / str(processes), []
        prepare(source, out, vocabulary, **{**SETTINGS, "processes": processes}, report=lambda m, d, t: said.append(d))  # noqa: B023
        reported.append(said)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert reported[0] == reported[1] and reported[0][-1] == len(DOCUMENTS)


# ---------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["jsonl", "texts", "hub"])
def test_killed_at_any_write_and_given_again_the_files_are_the_same(
    tmp_path, monkeypatch, vocabulary, small_pieces, kind
):
    if kind == "hub":
        (tmp_path / "rows").mkdir()
        for i in range(2):
            write_parquet(tmp_path / "rows" / f"{i}.parquet", DOCUMENTS[i::2])
        source = from_hub(monkeypatch, tmp_path / "rows")
    else:
        {"jsonl": write_jsonl, "texts": write_texts}[kind](tmp_path / "rows", DOCUMENTS)
        if kind == "jsonl":
            (tmp_path / "rows").rename(tmp_path / "rows.jsonl")
        source = find_source(tmp_path / ("rows.jsonl" if kind == "jsonl" else "rows"))
    prepare(source, tmp_path / "whole", vocabulary, **SETTINGS)
    write = shards.write_atomically
    for at in itertools.count():
        out, written = tmp_path / f"killed-{at}", itertools.count()

        def die(path, content, at=at, written=written):
            if next(written) == at:
                path.with_name(f".{path.name}.1.tmp").write_bytes(b"half of it")
                raise Killed
            write(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "write_atomically", die)
            try:
                prepare(source, out, vocabulary, **SETTINGS)
                break
            except Killed:
                pass
        prepare(source, out, vocabulary, **SETTINGS)
        assert files_of(out) == files_of(tmp_path / "whole")
    assert at > 10


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_command_that_was_killed_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(100_000)))
    options = f"prepare --source {tmp_path}/text.txt --tokenizer byte --shard-tokens 20000 --processes 2".split()
    command = [sys.executable, "-m", "fastgpt2.gpt2", *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    manifest = tmp_path / "killed" / "manifest.json"
    while process.poll() is None and not (manifest.is_file() and json.loads(manifest.read_bytes())["train"]):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 2  # those that encode; without care they would wait for work for ever
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in children):
        assert time.monotonic() < deadline, "processes of the pool outlive a killed command"
        time.sleep(0.05)
    before = shards.read_manifest(tmp_path / "killed")
    assert before.position is not None and before.train
    with pytest.raises(ValueError, match="not finished"):
        shards.open_tokens(tmp_path / "killed", "train")
    for out in ("killed", "whole"):
        assert cli.main([*options, "--processes", "1", "--out", str(tmp_path / out)]) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_finished_folder_is_left_as_it_is(tmp_path, source, vocabulary):
    first = prepare(source, tmp_path / "out", vocabulary, **SETTINGS)
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert prepare(source, tmp_path / "out", vocabulary, **SETTINGS) == first
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == times


# ------------------------------------------------------------------------------------------------- what is wrong


def test_other_settings_or_another_source_are_refused(tmp_path, source, vocabulary):
    prepare(source, tmp_path / "out", vocabulary, **SETTINGS)
    for spec, more, message in (
        ("byte", {}, f"tokenizer '{vocabulary}', now it is 'byte'"),
        (vocabulary, {"shard_tokens": 301}, "shard_tokens 300, now it is 301"),
        (vocabulary, {"val_tokens": None}, "val_tokens 500, now it is None"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {message}"):
            prepare(source, tmp_path / "out", spec, **{**SETTINGS, **more})
    write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS[1:])
    with pytest.raises(ValueError, match="rows.jsonl was changed since .*out was begun"):
        prepare(source, tmp_path / "out", vocabulary, **SETTINGS)


def test_a_folder_with_other_files_is_refused(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        prepare(source, tmp_path / "out", "byte", processes=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"val_tokens": 0}, "val_tokens is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"val_tokens": 10**6}, "rows.jsonl has .* tokens, val_tokens is 1000000: both"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, source, more, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out", "byte", **{**SETTINGS, **more})


def test_a_text_too_short_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="a.txt has 5 tokens, val_tokens is 0"):
        prepare(find_source(tmp_path / "a.txt"), tmp_path / "out", "byte", processes=1)


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_made(tmp_path, source, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["prepare", "--source", source.name, "--tokenizer", "byte", "--processes", "1", "--out", out]) == 0
    said = capsys.readouterr().out
    total = sum(map(len, DOCUMENTS))
    assert f"{out}: 40 documents, vocabulary 256" in said and f"fastgpt2 train --data {out}" in said
    assert f"{total - total // 10:,} in 1 training shards, {total // 10:,} for validation" in said


def test_without_a_source_it_is_pythons_own_text(tmp_path):
    assert parse(prepare_command.Options, ["--out", "x"], "prepare").source == ("python",)
    assert find_source("python").prompt == "def " and len(find_source("python").files) > 100
