"""Runs on two processes, through torchrun and gloo, are the run of one process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import hf_gpt2, write_folder
from tiny_run import finish, run, settings_in

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.training.log import read_log
from fastgpt2.gpt2.training.ranks import Ranks, parallelize, set_gradient_sync
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import Trainer

# 128 tokens a step: 4 passes of one process or 2 of each of two. 5 windows to validate on: a rank runs out of them.
MORE = dict(batch_size=2, total_batch_tokens=128, steps=8, eval_interval=4, eval_tokens=80, n_layer=2)
# On Triton a block's last bias is added by the block after it, which FSDP2 must not have put away by then.
SMALL = dict(steps=2, eval_interval=2, batch_size=1, block_size=8, total_batch_tokens=16, eval_tokens=16)
INTERPRETED = ops.TRITON_INSTALLED and not torch.cuda.is_available()
TRITON = {
    "fsdp triton": dict(parallel="fsdp", kernels="triton", **SMALL),
    "ddp optimizer": dict(parallel="ddp", optimizer="triton", steps=4, grad_clip=0.5),
    "fsdp optimizer": dict(parallel="fsdp", optimizer="triton", steps=4, grad_clip=0.5),
}
TRITON = TRITON if INTERPRETED else {}
RUNS = {
    **TRITON,
    "ddp": dict(parallel="ddp"),
    "fsdp": dict(parallel="fsdp"),
    "fsdp resumed": dict(parallel="fsdp", recompute=True),
    "fsdp float16": dict(parallel="fsdp", dtype="float16"),
    "ddp dropout": dict(parallel="ddp", dropout=0.2, vocab_multiple=100),
    "ddp dropout resumed": dict(parallel="ddp", dropout=0.2, vocab_multiple=100),
}
# These begin with a checkpoint's weights.
BEGUN = {"ddp begun": dict(parallel="ddp"), "fsdp begun resumed": dict(parallel="fsdp")}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {**settings_in(tmp_path_factory.mktemp("alone")), **MORE}


@pytest.fixture(scope="module")
def alone(settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "plot", lambda self: None)
        return run(settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A HuggingFace folder to begin with, of another vocabulary than the text's."""
    return {"init_from": str(write_folder(tmp_path_factory.mktemp("source"), hf_gpt2(vocab_size=300)))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, settings, source):
    """The folder of each of RUNS and BEGUN, made by two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    all_runs = {**RUNS, **{name: {**more, **source} for name, more in BEGUN.items()}}
    outs = {name: folder / name.replace(" ", "-") for name in all_runs}
    runs = [
        ({**settings, **more, "out": str(outs[name])}, 6 if "resumed" in name else None)
        for name, more in all_runs.items()
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = [str(Path(__file__).with_name("rank_runs.py")), str(folder)]
    done = subprocess.run([*torchrun, *worker], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return outs


def losses(folder):
    log = read_log(folder / "log.jsonl")
    return [r["loss"] for r in log], [r["val_loss"] for r in log if "val_loss" in r]


@pytest.mark.parametrize(("name", "rel"), [("ddp", 1e-5), ("fsdp", 1e-5), ("fsdp float16", 2e-3)])
def test_two_processes_train_as_one(alone, folders, name, rel):
    _, log, _ = alone
    training, validation = losses(folders[name])
    assert training == pytest.approx([r["loss"] for r in log], rel=rel)
    assert validation == pytest.approx([r["val_loss"] for r in log if "val_loss" in r], rel=rel)
    assert training[-1] < training[0] - 0.5
    assert read_log(folders[name] / "log.jsonl")[-1]["tokens"] == 8 * 128


@pytest.mark.parametrize("name", BEGUN)
def test_two_processes_begin_with_the_same_weights(settings, source, folders, name, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    result, log, _ = run({**settings, **source, "out": str(tmp_path / "run")})
    training, validation = losses(folders[name])
    assert training == pytest.approx([r["loss"] for r in log], rel=1e-5)
    assert validation == pytest.approx([r["val_loss"] for r in log if "val_loss" in r], rel=1e-5)
    assert GPT.from_pretrained(folders[name]).config == result.model.config


@pytest.mark.skipif(not TRITON, reason="needs Triton's interpreter")
def test_kernels_are_sharded_too(settings, folders, monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    expected = run({**settings, **SMALL, "out": settings["out"] + "-torch"})[1]
    training, validation = losses(folders["fsdp triton"])
    assert training == pytest.approx([r["loss"] for r in expected], rel=1e-5)
    assert validation == pytest.approx([expected[-1]["val_loss"]], rel=1e-5)


@pytest.mark.skipif(not TRITON, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["ddp optimizer", "fsdp optimizer"])
def test_our_optimizer_on_ranks(settings, folders, name, monkeypatch):
    """The norm is that of all shards: with its own alone a rank would clip otherwise."""
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    more = dict(RUNS[name], parallel="ddp", optimizer="torch", out=f"{settings['out']}-{name.replace(' ', '-')}")
    expected = run({**settings, **more})[1]
    log = read_log(folders[name] / "log.jsonl")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in log] == pytest.approx([r[key] for r in expected], rel=1e-4)
    assert log[0]["grad_norm"] > 0.5, "it clips"


@pytest.mark.parametrize("name", ["ddp dropout", "fsdp"])
def test_a_resumed_run_is_the_same_on_ranks(folders, name):
    """With FSDP2 the second one keeps no activations, which changes no bit either."""
    whole, resumed = folders[name], folders[f"{name} resumed"]
    assert losses(whole) == losses(resumed)
    first, second = (GPT.from_pretrained(f / "checkpoint").state_dict() for f in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "resumes" in (resumed / "said.txt").read_text()


def test_dropout_differs_between_ranks(folders, settings, alone):
    """With the same masks on both, a run of two is that of one whose halves of a batch share their masks."""
    states = torch.load(folders["ddp dropout"] / "checkpoint" / "training.pt", weights_only=True)["random"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_with_a_run_of_two(folders, name, tmp_path, alone):
    """The last checkpoint is whole parameters, whoever wrote it."""
    result, log, said = finish(None, resume=folders[name])
    assert len(log) == 8 and "resumes" in said
    assert ("note    parallel is fsdp, and this one process has all of the model" in said) == (name == "fsdp")
    for key, value in alone[0].model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_only_the_first_rank_speaks(folders):
    said = (folders["fsdp"] / "said.txt").read_text()
    assert len(re.findall("^folder ", said, re.M)) == 1 and "--- a sample, from" in said and "2 processes" in said


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_fails_on_one_rank_ends_the_run_on_all(tmp_path, settings):
    """Also where it is met with DDP in memory: nothing waits for ever, and every rank says what it was."""
    (tmp_path / "in-the-way").write_text("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = dict(SMALL, data=settings["data"], tokenizer="byte", out=tmp_path, device="cpu", n_layer=1, n_embd=8)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, "n_head": 1}.items()]
    done = subprocess.run([*command, "fastgpt2.gpt2", "train", *options], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "fastgpt2: error: out is" in done.stderr and "fastgpt2: error: rank 0: out is" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


# ------------------------------------------------------------------------------------------------------ gradient sync


def test_gradients_are_averaged_in_the_last_pass_alone(settings, monkeypatch):
    from fastgpt2.gpt2.training import trainer

    wanted, forwards = [], []
    monkeypatch.setattr(trainer, "set_gradient_sync", lambda module, wanted_now: wanted.append(wanted_now))
    monkeypatch.setattr(GPT, "forward", lambda self, *a, f=GPT.forward: forwards.append(len(wanted)) or f(self, *a))
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
    run({**settings, "out": settings["out"] + "-sync", "steps": 2, "eval_interval": 2})
    assert wanted == [False, False, False, True] * 2
    validation = 3
    assert forwards[validation : validation + 4] == [1, 2, 3, 4], "set before each forward"


def test_ddp_is_told_before_the_forward():
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    module = Wrapped()
    for wanted in (False, True):
        set_gradient_sync(module, wanted)
        assert module.require_backward_grad_sync is wanted


def test_alone_nothing_is_spread():
    model = GPT(GPTConfig(8, 11, 1, 1, 8), "torch")
    assert parallelize(model, Ranks(torch.device("cpu")), "fsdp", compile=False) is model


def test_a_gpu_of_its_own_for_each_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is 'cuda:1', but each of 2 processes uses another GPU"):
        Ranks.join("cuda:1")
