"""What a run saves: whole or not there, and enough to go on bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import finish, run, settings_in

from fastgpt2 import GPT
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.training.log import read_log
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer
from fastgpt2.gpt2.weights import checkpoints
from fastgpt2.gpt2.weights.checkpoints import find_corruption, save_checkpoint, saved_checkpoints

# Dropout and padded rows: what only the random numbers and the training state can bring back.
MORE = dict(dropout=0.1, vocab_multiple=100, eval_interval=4, steps=10, batch_size=2, total_batch_tokens=64)
# A checkpoint flushes 2 files of the tokenizer, 2 of the model, the state, files.json and 2 folders; about.json and
# config.yaml were before it. It renames as many files, then itself and the link; the third one removes the first.
KILLS = [
    ("step", 1), ("step", 4), ("update", 7), ("log", 8), ("step", 10),
    *(("sync", n) for n in (3, 7, 9, 10, 11, 15, 17)), *(("rename", n) for n in (5, 8, 9, 15, 16)), ("remove", 1),
]  # fmt: skip
# Before config.yaml is there: the same command begins again.
EARLY = [("sync", 1), ("rename", 1), ("sync", 2), ("rename", 2)]


pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped: (settings, result, log)."""
    settings = {**settings_in(tmp_path_factory.mktemp("whole")), **MORE}
    result, log, _ = run(settings)
    return settings, result, log


def assert_same(whole, result, log):
    """Every loss and every weight of a run is that of the run that nobody stopped."""
    timed = ("step_ms", "tokens_per_s", "peak_memory_bytes")
    assert [{k: v for k, v in r.items() if k not in timed} for r in log] == [
        {k: v for k, v in r.items() if k not in timed} for r in whole[2]
    ]
    expected = whole[1].model.state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# ------------------------------------------------------------------------------------------------------------ kills


@pytest.fixture(scope="module")
def killed(tmp_path_factory, whole):
    """The folder of a run that was killed, for each of EARLY and KILLS."""
    folder = tmp_path_factory.mktemp("killed")
    kills = [*EARLY, *KILLS]
    outs = [str(folder / f"{place}-{count}") for place, count in kills]
    runs = [({**whole[0], "out": out}, *kill) for out, kill in zip(outs, kills, strict=True)]
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, str(worker), str(folder)], capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(kills), done.stdout + done.stderr
    return {kill: Path(out) for out, kill in zip(outs, kills, strict=True)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_killed_run_goes_on_bit_for_bit(whole, killed, kill):
    result, log, _ = finish(None, resume=killed[kill])
    assert_same(whole, result, log)
    assert all(find_corruption(folder) is None for folder in saved_checkpoints(result.folder))
    assert (result.folder / "checkpoint").resolve() == saved_checkpoints(result.folder)[0].resolve()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kill", EARLY, ids=str)
def test_a_run_that_was_killed_before_its_settings_stood_begins_again(whole, killed, kill):
    folder = killed[kill]
    assert folder.is_dir() and not (folder / "config.yaml").exists()
    with pytest.raises(FileNotFoundError, match="killed before its settings were written: begin it again"):
        finish(None, resume=folder)
    result, log, _ = run({**whole[0], "out": str(folder)})
    assert_same(whole, result, log)
    assert not list(folder.glob("*.tmp"))


def test_a_signal_and_a_resume_are_a_run_that_nobody_stopped(whole, tmp_path, monkeypatch):
    original = Trainer.step

    def interrupted(self, at):
        if at == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result, log, _ = run({**whole[0], "out": str(tmp_path / "run")})
    assert result.stopped_by is signal.SIGTERM and len(log) == 6
    assert saved_checkpoints(result.folder)[0].name == "step-00000006"
    assert_same(whole, *finish(None, resume=result.folder)[:2])


def test_a_finished_run_resumes_to_what_it_is(whole):
    result, log, said = finish(None, resume=whole[1].folder)
    assert_same(whole, result, log)
    assert result.steps == 10 and result.loss == log[-1]["loss"] and "val loss" in said


# ----------------------------------------------------------------------------------------------------------- damage


def copied(whole, tmp_path) -> Path:
    shutil.copytree(whole[1].folder, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("training.pt", lambda b: b[:-1], "training.pt has .* bytes, .* were written"),
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "model.safetensors is not what was written"),
        ("files.json", lambda b: b[:9], "files.json cannot be used"),
        ("files.json", lambda b: b"{}", "files.json does not name all files"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path, file, harm, said):
    run = copied(whole, tmp_path)
    newest, before = saved_checkpoints(run)
    content = (newest / file).read_bytes()
    (newest / file).unlink()
    if harm is not None:
        (newest / file).write_bytes(harm(content))
    result, log, console = finish(None, resume=run)
    assert re.search(rf"damaged {newest}: {said}", console), console
    assert f"resumes {before}" in console
    assert_same(whole, result, log)
    assert find_corruption(newest) is None


def test_a_run_with_no_whole_checkpoint_is_refused(whole, tmp_path):
    run = copied(whole, tmp_path)
    for folder in saved_checkpoints(run):
        (folder / "training.pt").unlink()
    with pytest.raises(ValueError, match="none of its checkpoints is whole.*training.pt is missing"):
        finish(None, resume=run)


def test_the_newest_ones_stay(tmp_path):
    model, tokenizer = GPT(GPTConfig(8, 256, 1, 1, 8), "torch"), ByteTokenizer()
    for step in (5, 10, 200, 1000):
        save_checkpoint(tmp_path, step, model, tokenizer, {}, keep=3)
    assert [f.name for f in saved_checkpoints(tmp_path)] == ["step-00001000", "step-00000200", "step-00000010"]
    assert os.readlink(tmp_path / "checkpoint") == os.path.join("checkpoints", "step-00001000")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    model, tokenizer = GPT(GPTConfig(8, 256, 1, 1, 8), "torch"), ByteTokenizer()
    save_checkpoint(tmp_path, 1, model, tokenizer, {}, keep=1)

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoints.torch, "save", full)
        save_checkpoint(tmp_path, 2, model, tokenizer, {}, keep=1)
    (only,) = saved_checkpoints(tmp_path)
    assert only.name == "step-00000001" and find_corruption(only) is None
    save_checkpoint(tmp_path, 3, model, tokenizer, {}, keep=1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


# --------------------------------------------------------------------------------------------------------- the link


def test_a_link_that_a_kill_left_behind_is_made_new(whole, tmp_path):
    run = copied(whole, tmp_path)
    newest, before = saved_checkpoints(run)
    checkpoints.link_newest(run, before)
    finish(None, resume=run)
    assert (run / "checkpoint").resolve() == newest.resolve()


def test_a_copy_that_followed_the_link_goes_on(whole, tmp_path):
    run = shutil.copytree(whole[1].folder, tmp_path / "copy")  # as cp -rL
    shutil.rmtree(saved_checkpoints(run)[0])
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(saved_checkpoints(run)[0], run / "checkpoint")
    result, log, _ = finish(None, resume=run)
    assert_same(whole, result, log)
    assert (run / "checkpoint").is_symlink()
    assert (run / "checkpoint").resolve() == saved_checkpoints(run)[0].resolve()


def test_a_folder_of_somebody_else_in_the_links_place_stays(whole, tmp_path):
    run = copied(whole, tmp_path)
    (run / "checkpoint").unlink()
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="checkpoint is no link and no copy of a checkpoint of this run"):
        finish(None, resume=run)
    assert (run / "checkpoint" / "thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------- another config


@pytest.mark.parametrize(
    "other",
    [dict(lr=5e-3), dict(steps=9), dict(total_batch_tokens=128), dict(seed=1), dict(dtype="bfloat16")],
    ids=str,
)
def test_another_config_is_refused_before_anything_is_written(whole, tmp_path, other):
    run = copied(whole, tmp_path)
    before = (run / "log.jsonl").read_bytes()
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, the run .* was begun with {whole[0].get(name, '')}"):
        finish(TrainConfig(**{**whole[0], "out": None, **other}), resume=run)
    assert (run / "log.jsonl").read_bytes() == before


def test_what_is_kept_may_change(whole, tmp_path):
    run = copied(whole, tmp_path)
    shutil.rmtree(saved_checkpoints(run)[0])
    result, log, _ = finish(TrainConfig(**{**whole[0], "out": None, "keep": 1}), resume=run)
    assert_same(whole, result, log)
    assert len(saved_checkpoints(run)) == 1


def test_other_data_is_refused(whole, tmp_path):
    run, text = copied(whole, tmp_path), tmp_path / "text.txt"
    text.write_text(Path(whole[0]["data"]).read_text() + "more")
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(whole[0]["data"], str(text)))
    with pytest.raises(ValueError, match="tokens of the data is"):
        finish(None, resume=run)


def test_data_may_move_and_other_data_of_its_length_is_refused(whole, tmp_path):
    run, text = copied(whole, tmp_path), tmp_path / "moved.txt"
    shutil.rmtree(saved_checkpoints(run)[0])
    content = Path(whole[0]["data"]).read_text()
    text.write_text(content.replace("cat", "cow"))
    moved = TrainConfig(**{**whole[0], "out": None, "data": str(text)})
    with pytest.raises(ValueError, match="content of the data is"):
        finish(moved, resume=run)
    text.write_text(content)
    result, log, _ = finish(moved, resume=run)
    assert_same(whole, result, log)


@pytest.mark.parametrize(("old", "new"), [("lr: 0.01", "lr: 0.3"), ("n_embd: 32", "n_embd: 64")])
def test_a_config_that_was_edited_is_refused(whole, tmp_path, old, new):
    run = copied(whole, tmp_path)
    edited = (run / "config.yaml").read_text().replace(old, new)
    assert new in edited
    (run / "config.yaml").write_text(edited)
    name, value = new.split(": ")
    with pytest.raises(ValueError, match=f"{name} is {value}, the run .* was begun with {old.split(': ')[1]}"):
        finish(None, resume=run)


def test_a_run_that_met_a_bad_step_may_go_on_without_such_steps(whole, tmp_path):
    run = copied(whole, tmp_path)
    shutil.rmtree(saved_checkpoints(run)[0])
    result, log, _ = finish(TrainConfig(**{**whole[0], "out": None, "bad_steps": "skip", "spike": 9.0}), resume=run)
    assert_same(whole, result, log)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is no run: it has no config.yaml"):
        finish(None, resume=tmp_path)


def test_other_versions_are_noted(whole, tmp_path, monkeypatch):
    from fastgpt2.gpt2.training import run_folder

    monkeypatch.setattr(run_folder, "kernels_digest", lambda: "other kernels")
    said = finish(None, resume=copied(whole, tmp_path))[2]
    assert "kernels was" in said and "is other kernels" in said


def test_a_run_says_who_multiplies_its_matrices_on_a_cpu(whole, tmp_path, monkeypatch):
    from fastgpt2.gpt2 import linear

    if torch.cuda.is_available():
        pytest.skip("the run is on a GPU")
    run = copied(whole, tmp_path)
    assert json.loads((run / "about.json").read_text())["versions"]["matrix products"] == linear.library()
    other = not linear.ONEDNN_IS_FASTER
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", other)
    said = finish(None, resume=run)[2]
    names = ("oneDNN", "PyTorch") if other is False else ("PyTorch", "oneDNN")
    isa = torch.backends.cpu.get_cpu_capability()
    assert f"matrix products was {names[0]} ({isa}), is {names[1]} ({isa}): losses may differ in rounding" in said


def test_the_log_goes_back_to_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    folder.rewind_log(2)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n\0\0\n{"step": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2 is not JSON"):
        read_log(tmp_path / "log.jsonl")
    for line in ('{"loss": 2.0}', "[1]", '{"step": "1"}'):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match="log.jsonl, line 2 is not the record of a step"):
            read_log(tmp_path / "log.jsonl")
