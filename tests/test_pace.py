"""What takes long says so, and what nobody gave a length is as long as was promised."""

import contextlib
import dataclasses
import io
import json
import re
import threading
import time
import types

import numpy as np
import pytest
import test_ends
import torch
from rich.console import Console
from tiny_models import tiny

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.cli import eval as eval_command
from fastgpt2.gpt2.cli import prepare as prepare_command
from fastgpt2.gpt2.cli import train as train_command
from fastgpt2.gpt2.data import sources
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.data.windows import encode, silent
from fastgpt2.gpt2.evaluation import evaluate
from fastgpt2.gpt2.evaluation.evaluate import windows_at_once
from fastgpt2.gpt2.training import pace, progress
from fastgpt2.gpt2.training.train_config import TrainConfig

SMOKE = TrainConfig.from_preset("baby-smoke")


@pytest.mark.parametrize(("step_s", "steps", "every", "warmup"), [
    (0.01, 2000, 250, 100), (0.05, 2000, 250, 100), (0.1, 1000, 125, 50), (0.3, 300, 37, 15), (60.0, 100, 12, 5),
])  # fmt: skip
def test_steps_are_as_many_as_two_minutes_hold(monkeypatch, step_s, steps, every, warmup):
    monkeypatch.setattr(pace, "step_seconds", lambda config: step_s)
    config, ms = pace.fitted(SMOKE)
    assert config == dataclasses.replace(SMOKE, steps=steps, eval_interval=every, warmup=warmup)
    assert ms == pytest.approx(step_s * 1e3)


def test_a_step_is_measured_as_training_takes_it(monkeypatch):
    class Clock:
        ticks = iter(range(100))

        def perf_counter(self):
            return float(next(self.ticks))

    monkeypatch.setattr(pace, "MEASURE_S", 0.0)
    monkeypatch.setattr(pace, "time", Clock())
    config = dataclasses.replace(SMOKE, n_layer=1, n_embd=8, n_head=1, block_size=8, batch_size=2)
    assert pace.step_seconds(config) == 1.0  # one step of a machine that is slow
    monkeypatch.setattr(pace, "MEASURE_S", 30.0)
    monkeypatch.setattr(pace, "time", Clock())
    assert pace.step_seconds(config) == 1.0


@pytest.mark.parametrize(("arguments", "sized"), [
    ([], True), (["--data", "x"], True), (["--steps", "3"], False), (["--preset", "baby"], False),
    (["--config=x.yaml"], False), (["--resume", "x"], False),
])  # fmt: skip
def test_only_what_nobody_gave_a_length_is_measured(monkeypatch, tmp_path, arguments, sized):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for file in ("x.yaml", "x/config.yaml"):
        (tmp_path / file).write_text("lr: 0.01\n")
    assert train_command.parse([*arguments, "--device", "cpu"]).fit == sized
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not train_command.parse([*arguments, "--device", "cpu"]).fit


def test_the_command_trains_as_long_as_was_measured(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(pace, "step_seconds", lambda config: 0.2)
    result = types.SimpleNamespace(stopped_by=None)
    monkeypatch.setattr(train_command.train, "train", lambda config, **more: seen.append(config) or result)
    assert train_command.main(["--device", "cpu"]) == 0
    assert seen[0].steps == 500 and seen[0].preset == "baby-smoke"
    assert "a step takes about 200 ms here: 500 steps in about two minutes" in capsys.readouterr().out


def test_a_long_evaluation_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    tiny(vocab_size=256).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    arguments = ["eval", "--checkpoint", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt"), "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""  # it took no two seconds
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(eval_command, "stages", lambda *args: contextlib.nullcontext(silent))
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (
        lines[0].startswith("text: 1 of 16 batches, about ") and lines[-1] == "text: 16 of 16 batches, about 0 s left"
    )
    assert json.loads(out.splitlines()[-1])["text"]["tokens"] == 999


def test_what_a_long_start_is_at_is_told(capsys, monkeypatch):
    console = Console(file=io.StringIO())
    with progress.stages(console, "start") as say:
        say("this took no two seconds")
    monkeypatch.setattr(progress, "QUIET_S", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    assert capsys.readouterr().err == ""
    told = threading.Event()
    monkeypatch.setattr(progress, "print", lambda *text, **more: (print(*text, **more), told.set()), raising=False)
    with pytest.raises(ValueError, match="mine"), progress.stages(console, "start") as say:
        say("3 of 7 shards compared")
        assert told.wait(30)
        raise ValueError("mine")
    told.clear()
    assert not told.wait(0.1), "it goes on after its end"
    err = capsys.readouterr().err.splitlines()
    assert err and all(line == "start: 3 of 7 shards compared, 0 s so far" for line in err[1:])
    assert not console.file.getvalue()


def test_a_start_on_a_terminal_is_beside_a_spinner(capsys):
    terminal = Console(file=test_ends.Terminal(), force_terminal=True)
    with progress.stages(terminal, "start") as say:
        say("encoding")
        time.sleep(0.2)
    assert "start: encoding" in terminal.file.getvalue()
    with progress.stages(Console(file=(quiet := io.StringIO()), quiet=True), "start") as say:
        say("on another rank")
    assert not quiet.getvalue() and not capsys.readouterr().err


def test_every_long_step_before_training_says_what_it_is(tmp_path, monkeypatch):
    said = []
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("some text\n" * 100)
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 100)
    corpus = load_corpus(str(tmp_path / "text"), "char", 0.1, 8, say=said.append)
    assert "3 documents read" in said and "finding the tokenizer" in said
    encoded = [text for text in said if text.endswith("of 3,000 characters encoded")]
    assert len(encoded) > 20 and encoded[-1].startswith("100%")
    whole = encode([("some text\n" * 100, True)] * 3, corpus.tokenizer)
    assert np.array_equal(np.concatenate([corpus.train, corpus.val]), whole)

    counted = []
    prepare(find_source(tmp_path / "text"), tmp_path / "out", "char", shard_tokens=500, processes=1, say=counted.append)
    assert counted == ["1 documents read", "2 documents read", "3 documents read"]
    said.clear()
    load_corpus(str(tmp_path / "out"), None, 0.1, 8, say=said.append)
    assert any(text.endswith("train shards compared with their checksums") for text in said)


def test_prepare_says_how_far_it_is_between_two_shards(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(prepare_command, "QUIET_S", 0.0)
    monkeypatch.setattr(prepare_command, "LINE_EVERY_S", 0.0)
    arguments = ["prepare", "--source", str(tmp_path / "a.txt"), "--tokenizer", "char", "--processes", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "at      1 documents read\n" in out and re.search(r"at      0 documents, \d+ tokens so far", out)


def test_on_a_terminal_it_is_a_bar():
    terminal = Console(file=test_ends.Terminal(), force_terminal=True)
    assert list(progress.watched(terminal, "text")([1, 2])) == [1, 2]
    assert "text" in terminal.file.getvalue()


def test_batches_are_as_large_as_memory_allows(monkeypatch):
    model, gpu = tiny(), torch.device("cuda", 0)
    assert windows_at_once(model, torch.device("cpu")) == 8
    c = model.config
    one = 4 * c.block_size * (3 * c.vocab_size + 24 * c.n_embd)
    for free, batch in ((0, 8), (2 * 20 * one, 20), (2 * 1000 * one, 64)):
        monkeypatch.setattr(evaluate.torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert windows_at_once(model, gpu) == batch
