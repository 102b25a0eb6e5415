"""Checkpoints that are not what a run wrote: no reader takes one without a word, none counts among those kept."""

import json
import re
import shutil

import pytest
import torch
from tiny_run import finish, run, settings_in

from fastgpt2 import GPT
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.weights.checkpoints import (
    WEIGHTS,
    find_corruption,
    folder_to_read,
    save_checkpoint,
    saved_checkpoints,
)

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, and its settings."""
    settings = {**settings_in(tmp_path_factory.mktemp("trained")), "steps": 4, "eval_interval": 2}
    return run(settings)[0].folder, settings


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of it, two bits of the newest weights flipped: (run, newest checkpoint, the one before)."""
    folder = shutil.copytree(trained[0], tmp_path / "run", symlinks=True)
    newest, before = saved_checkpoints(folder)
    flip(newest / WEIGHTS)
    return folder, newest, before


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x60
    path.write_bytes(content)


def rewritten(folder, name, value):
    """A checkpoint with other weights, of which its files.json knows: what an overflow in a step would have left."""
    from safetensors.torch import load_file, save_file

    from fastgpt2.gpt2.weights import checkpoints

    weights = load_file(folder / WEIGHTS)
    weights[name].view(-1)[3] = value
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    files = json.loads((folder / "files.json").read_text())
    files[WEIGHTS] = checkpoints._fingerprint(folder / WEIGHTS)
    (folder / "files.json").write_text(json.dumps(files))


# ---------------------------------------------------------------------------------------------------------- readers


READERS = [GPT.from_pretrained, lambda folder: load_checkpoint(folder)[0]]


@pytest.mark.parametrize("read", READERS, ids=["from_pretrained", "load_checkpoint"])
@pytest.mark.parametrize("name", ["", "checkpoint"])
def test_a_whole_one_is_read_from_the_run_or_its_folder(trained, read, name):
    folder = trained[0]
    expected = GPT.from_pretrained(folder / "checkpoints" / "step-00000004").state_dict()
    for key, value in read(str(folder / name)).state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("read", READERS, ids=["from_pretrained", "load_checkpoint"])
def test_of_a_run_the_newest_whole_one_is_read_and_named(damaged, read):
    run, newest, before = damaged
    with pytest.warns(UserWarning, match=rf"damaged {newest}: {WEIGHTS} is not what was.*; {before.name} is taken"):
        model = read(run)
    assert torch.equal(model.lm_head.weight, GPT.from_pretrained(before).lm_head.weight)


@pytest.mark.parametrize("read", READERS, ids=["from_pretrained", "load_checkpoint"])
@pytest.mark.parametrize("name", ["checkpoint", "checkpoints/step-00000004"])
def test_a_damaged_one_that_is_named_is_refused(damaged, read, name):
    with pytest.raises(ValueError, match=f"{name} is damaged: {WEIGHTS} is not what was written"):
        read(damaged[0] / name)


@pytest.mark.parametrize(
    ("file", "content"), [("files.json", None), ("files.json", b"{"), ("config.json", b"{}"), ("tokenizer.json", b"{}")]
)
def test_every_file_that_is_read_is_looked_at(trained, tmp_path, file, content):
    folder = shutil.copytree(trained[0], tmp_path / "run", symlinks=True)
    path = folder / "checkpoint" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint is damaged: {file}"):
        load_checkpoint(folder / "checkpoint")


def test_only_a_run_that_goes_on_reads_the_optimizer(trained, tmp_path, recwarn):
    folder = shutil.copytree(trained[0], tmp_path / "run", symlinks=True)
    flip(folder / "checkpoint" / "training.pt")
    load_checkpoint(folder)
    assert not recwarn.list and f"damaged {folder}" in finish(None, resume=folder)[2]


@pytest.mark.filterwarnings("default:damaged")
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_the_commands_say_it_or_refuse(damaged, trained, command, capsys):
    run, newest, before = damaged
    options = {"eval": ["--text", trained[1]["data"]], "sample": ["--prompt", "line", "--max-new-tokens", "2"]}[command]
    capsys.readouterr()
    assert cli.main([command, "--checkpoint", str(run), *options]) == 0
    _, err = capsys.readouterr()
    assert re.fullmatch(rf"fastgpt2: warning: damaged {newest}: .* differs; {before.name} is taken instead\n", err)
    assert cli.main([command, "--checkpoint", str(newest), *options]) == 2
    assert capsys.readouterr().err.startswith(f"fastgpt2: error: {newest} is damaged: ")
    for folder in (run, newest):
        assert cli.main([command, "--checkpoint", str(folder), *options, "--no-check"]) == 0
        out, err = capsys.readouterr()
        assert out and not err


def test_without_a_check_the_newest_one_is_read(damaged):
    run, newest, _ = damaged
    assert folder_to_read(run, check=False) == newest and folder_to_read(newest, check=False) == newest


def test_weights_that_are_no_numbers_are_damage(trained, tmp_path):
    for i, value in enumerate((float("nan"), float("-inf"))):
        folder = shutil.copytree(trained[0], tmp_path / str(i), symlinks=True)
        newest, before = saved_checkpoints(folder)
        rewritten(newest, "transformer.h.0.mlp.c_fc.bias", value)
        with pytest.raises(ValueError, match="mlp.c_fc.bias in model.safetensors holds infinity or NaN"):
            GPT.from_pretrained(newest)
        said = finish(None, resume=folder)[2]
        assert "holds infinity or NaN" in said and f"resumes {before}" in said


# -------------------------------------------------------------------------------------------------------- what stays


def small(tmp_path, *steps, keep):
    model, tokenizer = GPT(GPTConfig(8, 256, 1, 1, 8), "torch"), ByteTokenizer()
    for step in steps:
        save_checkpoint(tmp_path, step, model, tokenizer, {}, keep=keep)
    return [int(folder.name.removeprefix("step-")) for folder in reversed(saved_checkpoints(tmp_path))]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_beside_a_damaged_newer_one(tmp_path, keep):
    assert small(tmp_path, 10, 20, 30, keep=3) == [10, 20, 30]
    for step in (20, 30):
        flip(tmp_path / "checkpoints" / f"step-{step:08}" / WEIGHTS)
    assert small(tmp_path, 15, keep=keep) == ([15, 20, 30] if keep == 1 else [10, 15, 20, 30])
    assert find_corruption(tmp_path / "checkpoint") is None
    assert small(tmp_path, 20, 25, 30, keep=keep) == ([30] if keep == 1 else [25, 30])


def test_damaged_ones_do_not_count(tmp_path):
    small(tmp_path, 10, 20, keep=2)
    flip(tmp_path / "checkpoints" / "step-00000020" / WEIGHTS)
    assert small(tmp_path, 30, keep=2) == [10, 20, 30]
    assert small(tmp_path, 40, keep=2) == [30, 40]


def test_a_whole_one_is_read_once(tmp_path, monkeypatch):
    from fastgpt2.gpt2.weights import checkpoints

    seen = []
    monkeypatch.setattr(
        checkpoints, "find_corruption", lambda folder: seen.append(folder.name) or find_corruption(folder)
    )
    small(tmp_path, 10, 20, 30, 40, keep=3)
    assert sorted(seen) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    assert small(tmp_path, 1, keep=1) == [1]
    model = GPT(GPTConfig(8, 256, 1, 1, 8), "torch")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[2, 3] = value
    with pytest.raises(FloatingPointError, match="step 2: transformer.h.0.attn.c_attn.weight holds infinity or NaN"):
        save_checkpoint(tmp_path, 2, model, ByteTokenizer(), {}, keep=1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
