"""Whatever lies in a run's folder or stands in an input: the right result, or one line that says what is wrong.

Never a traceback, and never another result without a word.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import run, settings_in

from fastgpt2 import GPT
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data import vocabularies
from fastgpt2.gpt2.data.shards import open_tokens
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt2.gpt2.training.train_config import read_settings

pytestmark = pytest.mark.usefixtures("quick_runs")
ONE_LINE = re.compile(r"fastgpt2: error: [^\n]+\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a run with checkpoints of steps 2 and 4, its weights at both)."""
    settings = {**settings_in(tmp_path_factory.mktemp("trained")), "steps": 4, "eval_interval": 2, "block_size": 8}
    folder = run({**settings, "n_embd": 8, "eval_tokens": 16})[0].folder
    return folder, [weights(folder / "checkpoints" / f"step-0000000{step}") for step in (4, 2)]


def weights(folder):
    return GPT.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def missing(file):
    file.unlink()


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flipped(file):
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def folder(file):
    file.unlink()
    file.mkdir()


def link(file):
    """To nowhere: of a copy that took the links without what they lead to."""
    file.unlink()
    file.symlink_to("nowhere")


FILES = ["config.yaml", "about.json", "log.jsonl", ".fastgpt2.lock", "checkpoint"] + [
    f"checkpoints/step-00000004/{name}"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.pt",
        "files.json",
    )
]


@pytest.mark.parametrize("harm", [missing, truncated, empty, flipped, folder, link], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("default:damaged")
def test_a_broken_run_folder(trained, tmp_path, capsys, name, harm):
    original, (newest, before) = trained
    if name == "checkpoint" and harm in (truncated, empty, flipped):
        pytest.skip("a link has no content")
    commands = {
        "train": ["--resume"],
        "sample": ["--prompt", "line", "--max-new-tokens", "3", "--checkpoint"],
        "eval": ["--text", str(original.parent / "short.txt"), "--checkpoint"],
        "plot": ["--out", str(tmp_path / "a.png")],
    }
    del commands["plot" if "/" in name else "eval"]
    (original.parent / "short.txt").write_text("line 1: the cat")
    for command, arguments in commands.items():
        copy = tmp_path / command
        shutil.copytree(original, copy, symlinks=True)
        harm(copy / name)
        capsys.readouterr()
        status = cli.main([command, *arguments, str(copy)])
        out, err = capsys.readouterr()
        if status:
            assert status == 2 and ONE_LINE.fullmatch(err), (command, err)
            continue
        said = "damaged" in out + err
        if command == "train":
            assert same(weights(copy / "checkpoints" / "step-00000004"), newest), command
        if command == "eval":
            model = GPT.from_pretrained(original / "checkpoints" / f"step-0000000{2 if said else 4}")
            loss = json.loads(out.splitlines()[-1])["text"]["loss"]
            assert loss == pytest.approx(loss_of(model, "line 1: the cat"), rel=1e-4)


def loss_of(model, text):
    idx = torch.from_numpy(ByteTokenizer().encode(text).astype(np.int64))[None]
    total, count = 0.0, 0
    with torch.no_grad():  # two windows of 8 that end with the text: see data.strided
        for start, new in ((0, 8), (idx.size(1) - 9, idx.size(1) - 9)):
            logits, _ = model.eval()(idx[:, start : start + 8], idx[:, start + 1 : start + 9])
            nats = torch.nn.functional.cross_entropy(logits[0], idx[0, start + 1 : start + 9], reduction="none")
            total, count = total + nats[8 - new :].sum().item(), count + new
    return total / count


# -------------------------------------------------------------------------------------------------------------- inputs

PREPARED = ("prepare", "--processes", "1", "--shard-tokens", "50", "--tokenizer")
ODD = "ab \n\t\r\x00\x1b\ufeff\u2028\x85é🙂"
texts = st.text(st.characters(), max_size=40) | st.text(st.sampled_from(ODD), max_size=60)


def ends_well(arguments, capsys):
    """The exit status of a command, which is 0, or 2 with one line."""
    capsys.readouterr()
    status = cli.main(arguments)
    err = capsys.readouterr().err
    assert status == 0 or (status == 2 and ONE_LINE.fullmatch(err)), err
    return status


@given(text=texts, tokenizer=st.sampled_from(["char", "byte"]))
@example("\ufeff" + "ab" * 20, "byte")
def test_any_text_is_prepared_as_it_is(tmp_path_factory, capsys, text, tokenizer):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(text.encode())
    arguments = [*PREPARED, tokenizer, "--source", str(folder / "a.txt"), "--out", str(folder / "out")]
    if ends_well(arguments, capsys) == 0:
        text = text.removeprefix("\ufeff")
        made = tokenizers.load(folder / "out")
        tokens = np.concatenate([open_tokens(folder / "out", split)[:] for split in ("val", "train")])
        assert tokens.tolist() == made.encode(text).tolist()
        assert tokenizer == "char" or made.decode(tokens) == text


@given(content=st.binary(max_size=80))
@example(b"\xff\xfeab")
@example(b"ab\xc3")
def test_any_bytes_are_text_or_refused(tmp_path_factory, capsys, content):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.txt").write_bytes(content)
    status = ends_well([*PREPARED, "byte", "--source", str(folder / "a.txt"), "--out", str(folder / "out")], capsys)
    try:
        content.decode()
    except UnicodeDecodeError:
        assert status == 2


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=3)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "a"]), values | texts, max_size=2), max_size=4))
@example([{"text": "ab\ud800" * 20}])
def test_any_json_lines_are_documents_or_refused(tmp_path_factory, capsys, rows):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = ends_well([*PREPARED, "byte", "--source", str(folder / "a.jsonl"), "--out", str(folder / "out")], capsys)
    if not all(isinstance(row.get("text"), str) for row in rows):
        assert status == 2
    if status == 0:
        tokens = np.concatenate([open_tokens(folder / "out", split)[:] for split in ("val", "train")])
        assert ByteTokenizer().decode(tokens) == "".join(row["text"] for row in rows)


@given(st.text(st.sampled_from("lr: steps\n-0.1e&*!{}[]#\"'|>%@\t1o"), max_size=40))
@example("lr: &a [*a]")
@example("? [a]\n: 1")
@example("lr: 1\n---\nlr: 2")
@example("lr: !!python/object:os.system x")
def test_any_settings_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("settings") / "run.yaml"
    file.write_text(content)
    try:
        settings = read_settings(file)
    except ValueError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert settings.keys() <= {"lr", "steps"}


BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b"  ": 256, b"    ": 257, b" a": 258, b"\n\n": 259})


@given(st.lists(st.tuples(st.sampled_from(" \n\x85\u3000\x1c"), st.integers(1, 12)) | st.just(("a.1", 1)), max_size=8))
def test_long_spaces_have_the_tokens_of_short_ones(runs):
    """With a limit of 4 characters runs of whitespace go another way, to the same tokens."""
    text = "".join(character * count for character, count in runs)
    whole = BPE._encoding.encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        shorter = vocabularies._LONG_SPACE.pattern.replace("10000", "4")
        patch.setattr(vocabularies, "_LONG_SPACE", re.compile(shorter))
        assert BPE.encode(text).tolist() == whole


def test_a_million_spaces_are_encoded():
    ids = BPE.encode("a" + " " * 1_000_001 + "a")
    assert BPE.decode(ids) == "a" + " " * 1_000_001 + "a" and len(ids) == 250_002 and ids[-1] == 258
