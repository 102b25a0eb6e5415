"""`prepare` that dies before any operation on a file of its folder: the same call goes on to the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.data.tokenizer import BPETokenizer
from fastgpt2.gpt2.files import LOCK

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SETTINGS = dict(shard_tokens=150, val_tokens=100, processes=1)
KINDS = ("char", "vocabulary")


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """(calls of `prepare` by name, folder of the dead ones)."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text(f"line {i} of a text, and another one\n" * 5)
    vocabulary = folder / "vocabulary"
    BPETokenizer({bytes([b]): b for b in range(256)}).save(vocabulary)
    (vocabulary / "chat_template.jinja").write_text("{{ messages }}")  # more files than a tokenizer of ours has
    calls = {
        name: [str(folder / "text"), spec, SETTINGS]
        for name, spec in zip(KINDS, ("char", str(vocabulary)), strict=True)
    }
    (folder / "calls.json").write_text(json.dumps(calls))
    worker = Path(__file__).with_name("killed_prepares.py")
    done = subprocess.run([sys.executable, str(worker), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return calls, folder


def files_of(folder):
    """By name; the lock says who had the folder last, which nobody reads once that process is gone."""
    return {f.name: b"" if f.name == LOCK else f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_go_on(deaths, kind, tmp_path):
    calls, folder = deaths
    source, tokenizer, settings = calls[kind]
    whole = prepare(find_source(source), tmp_path / "whole", tokenizer, **settings)
    dead = sorted(folder.glob(f"{kind}-*"), key=lambda f: int(f.name.rpartition("-")[2]))
    numbers = [int(f.name.rpartition("-")[2]) for f in dead]
    assert len(numbers) > 25 and numbers == list(range(numbers[0], numbers[-1] + 1)) and numbers[0] <= 2
    unfinished = 0
    for out in dead:
        unfinished += files_of(out) != files_of(tmp_path / "whole")
        assert prepare(find_source(source), out, tokenizer, **settings) == whole, out
        assert files_of(out) == files_of(tmp_path / "whole"), out
    assert unfinished >= len(dead) - 2
