"""Whole runs of a tiny model: what they write, that they repeat, and how they end."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import signal
import threading

import pytest
import torch
from rich.console import Console
from tiny_run import TINY, run, settings_in

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.data.windows import Windows, encode, read_text, split
from fastgpt2.gpt2.evaluation.evaluate import evaluating, mean_loss
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.log import read_log
from fastgpt2.gpt2.training.optim import cosine_schedule
from fastgpt2.gpt2.training.progress import line
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.stop_signals import StopSignals
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train
from fastgpt2.gpt2.training.train_config import PRESETS, find_device, read_settings


@pytest.fixture
def settings(tmp_path):
    return settings_in(tmp_path)


def losses(settings, name, **more):
    with pytest.MonkeyPatch.context() as patch:
        # Plot and sample are most of the time of such a run, and change no loss.
        patch.setattr(RunFolder, "plot", lambda self: None)
        patch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
        return [r["loss"] for r in run(settings, out=settings["out"] + name, **more)[1]]


# ------------------------------------------------------------------------------------------------- what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(settings_in(tmp_path_factory.mktemp("finished")))


def test_the_loss_falls(finished):
    result, log, _ = finished
    assert log[0]["loss"] == pytest.approx(math.log(256), rel=0.02)
    assert result.loss < log[0]["loss"] - 1 and result.val_loss < log[0]["loss"] - 1


def test_the_log_has_a_line_a_step(finished):
    result, log, _ = finished
    config = TrainConfig(**TINY)
    assert [r["step"] for r in log] == list(range(1, 21))
    for r in log:
        names = {"step", "tokens", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "peak_memory_bytes"}
        assert set(r) - {"val_loss"} == names
        assert r["tokens"] == r["step"] * 4 * 16 and r["grad_norm"] > 0
        assert r["tokens_per_s"] == pytest.approx(64 / r["step_ms"] * 1e3)
        assert r["lr"] == cosine_schedule(r["step"] - 1, peak=config.lr, floor=config.min_lr, warmup=5, steps=20)
    assert [r["step"] for r in log if "val_loss" in r] == [10, 20]
    assert log[-1]["val_loss"] == result.val_loss


def test_the_config_is_the_runs_own(finished):
    result, _, _ = finished
    folder = result.folder.parent
    settings = read_settings(result.folder / "config.yaml")
    assert TrainConfig(**settings) == TrainConfig(**{**settings_in(folder), "dtype": "float32", "out": None})
    content = json.loads((result.folder / "about.json").read_text())
    assert content["model"] == dataclasses.asdict(result.model.config) and content["kernels"]["attention"] == "torch"


def test_the_checkpoint_is_the_trained_model(finished):
    result, _, _ = finished
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = load_checkpoint(result.folder)
    idx = torch.from_numpy(tokenizer.encode("the cat").astype("int64"))[None]
    theirs = GPT2LMHeadModel.from_pretrained(result.folder / "checkpoint").eval()
    with evaluating(result.model), evaluating(model):
        expected = result.model(idx)[0]
        assert torch.equal(model(idx)[0], expected)
        torch.testing.assert_close(theirs(idx).logits[:, -1:], expected)
    assert AutoTokenizer.from_pretrained(result.folder / "checkpoint")("the cat").input_ids == idx[0].tolist()


def test_the_plot_is_a_picture(finished):
    from matplotlib.image import imread

    result, _, _ = finished
    picture = imread(result.folder / "loss.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.01


def test_the_console_ends_with_a_sample_and_the_path(finished):
    result, log, said = finished
    assert "1 documents, " in said and "1 layers, 2 heads, width 32, block 16" in said
    recent = sum(r["loss"] for r in log) / 20  # the mean of the last 20 steps
    assert f"step 20/20  mean train loss {recent:.4f}  val loss {log[-1]['val_loss']:.4f}" in said
    assert "--- a sample, from '\\n' ---" in said
    assert str(result.folder) in said.splitlines()[-2] and "fastgpt2 sample --checkpoint" in said.splitlines()[-1]
    assert "\x1b" not in said


def test_the_model_that_is_left_trains_on(finished):
    assert finished[0].model.training and finished[0].stopped_by is None


# ----------------------------------------------------------------------------------------------------- same numbers


def test_same_seed_same_losses(settings):
    first = losses(settings, "1", dropout=0.1, seed=5)
    assert first == losses(settings, "2", dropout=0.1, seed=5)
    assert first != losses(settings, "3", dropout=0.1, seed=6)


def test_validation_does_not_change_training(settings):
    seldom = losses(settings, "1", dropout=0.1, eval_interval=20)
    assert seldom == losses(settings, "2", dropout=0.1, eval_interval=3)


def test_validation_loss_is_a_mean_over_tokens(finished):
    model, device = finished[0].model, torch.device("cpu")
    idx, targets = torch.randint(256, (2, 5, 16))
    whole = mean_loss(model, [(idx, targets)], device)
    parts = mean_loss(model, [(idx[:4], targets[:4]), (idx[4:], targets[4:])], device)
    assert parts == pytest.approx(whole, rel=1e-5)
    with evaluating(model):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_run_is_the_textbooks_loop(settings):
    config = TrainConfig(**{**settings, "grad_clip": 0.3})
    text = read_text(config.data)
    pieces = [(document, True) for document in text.documents]
    tokens, _ = split(encode(pieces, ByteTokenizer()), config.val_fraction, config.block_size)
    windows = Windows(tokens, config.block_size, config.seed)
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(256), kernels="torch")
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2))
    expected = []
    for step in range(config.steps):
        idx, targets = windows.next_batch(config.batch_size)
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for p in model.parameters():
            p.grad *= min(1.0, config.grad_clip / norm.item())
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, peak=config.lr, floor=config.min_lr, warmup=5, steps=config.steps)
        optimizer.step()
        expected.append(loss.item())
    assert losses(settings, "1", grad_clip=0.3) == pytest.approx(expected, rel=1e-4)


def test_accumulation_is_a_bigger_batch(settings):
    whole = losses(settings, "1", batch_size=4)
    parts = losses(settings, "2", batch_size=1, total_batch_tokens=64)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_bfloat16_trains_alike(settings):
    exact = losses(settings, "1")
    rounded = losses(settings, "2", dtype="bfloat16")
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.skipif(not ops.TRITON_INSTALLED, reason="needs Triton")
def test_triton_trains_alike(settings, device):
    sizes = dict(
        steps=3, batch_size=2, block_size=8, n_head=1, n_embd=16, eval_interval=3, eval_tokens=16, device=device.type
    )
    exact = losses(settings, "1", kernels="torch", **sizes)
    assert losses(settings, "2", kernels="triton", **sizes) == pytest.approx(exact, rel=1e-4)


@pytest.mark.slow
def test_compiled_trains_alike(settings):
    assert losses(settings, "1", compile=True) == pytest.approx(losses(settings, "2"), rel=1e-4)


@pytest.mark.parametrize("preset", [n for n in PRESETS if n.endswith("-smoke") and not n.startswith("finetune")])
def test_smoke_presets_train(settings, preset):
    config = TrainConfig.from_preset(preset, data=settings["data"], device="cpu", dtype="float32")
    corpus = load_corpus(config.data, config.tokenizer, config.val_fraction, config.block_size)
    trainer = Trainer(config, corpus.tokenizer, corpus.train, corpus.val)
    first, second = trainer.step(1), trainer.step(2)
    assert first.tokens == config.tokens_per_step() < 1000 and second.loss < first.loss < 6


# --------------------------------------------------------------------------------------------------------- endings


def interrupted_at(monkeypatch, step, number, times=1):
    """Sends this process `number` while step `step` is computed."""
    original = Trainer.step

    def interrupted(self, at):
        if at == step:
            for _ in range(times):
                signal.raise_signal(number)
        return original(self, at)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_stands(settings, monkeypatch, number):
    handler = signal.getsignal(number)
    interrupted_at(monkeypatch, 7, number)
    result, log, said = run(settings)
    assert result.stopped_by is number and result.steps == len(log) == 7 and "val_loss" not in log[-1]
    model, _ = load_checkpoint(result.folder)
    for saved, trained in zip(model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(saved, trained)
    assert (result.folder / "loss.png").stat().st_size > 0
    assert f"stopped by {number.name} after step 7" in said and "a sample" not in said
    assert signal.getsignal(number) is handler


def test_a_second_signal_leaves_at_once(settings, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    interrupted_at(monkeypatch, 7, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert signal.getsignal(signal.SIGINT) is handler


def test_torchrun_may_say_it_twice():
    with StopSignals(launched=True) as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert stop.received in (signal.SIGINT, signal.SIGTERM)


def test_training_outside_the_main_thread(settings):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(settings, steps=2)))
    thread.start()
    thread.join()
    assert len(results[0][1]) == 2


def test_a_loss_that_is_no_number_stops_the_run(settings, monkeypatch):
    original = Trainer.step

    def broken(self, step):
        if step == 15:
            self.model.transformer.ln_f.weight.data.fill_(math.nan)
        return original(self, step)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(FloatingPointError, match="step 15: the loss is nan.*lower lr"):
        run(settings)
    folder = RunFolder(pathlib.Path(settings["out"]))
    assert len(read_log(folder.path / "log.jsonl")) == 14
    model, _ = load_checkpoint(folder.path)  # as validated at step 10
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(data="/no/such/text"), "no such file"),
        (dict(block_size=4000), "need at least"),
        (dict(tokenizer="words"), "tokenizer is 'words', allowed are char, byte, gpt2"),
        (dict(device="warp"), "device is 'warp'"),
        (dict(kernels="atention"), "atention"),
        (dict(n_embd=33), "n_embd is 33.*divisible by n_head"),
    ],
)
def test_nothing_is_written_for_settings_that_do_not_work(settings, wrong, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run(settings, **wrong)
    assert not (tmp_path / "run").exists()


def test_a_missing_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device is 'cuda', which cannot be used here"):
        find_device("cuda")


def test_an_old_run_is_not_written_over(finished, settings):
    before = (finished[0].folder / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run: --resume .* goes on with it"):
        run(settings, out=str(finished[0].folder))
    assert (finished[0].folder / "log.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- the folder


def test_folders_of_the_same_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda format: "2030-01-02_03-04-05")
    with contextlib.ExitStack() as held:
        first = RunFolder.create(None, "baby", held)  # locked
        second = RunFolder.create(None, "baby", held)
        (second.path / "config.yaml").touch()
    with contextlib.ExitStack() as held:
        (first.path / "config.yaml").touch()
        assert str(RunFolder.create(None, "baby", held).path) == f"{first.path}-3"
    assert str(first.path) == "runs/2030-01-02_03-04-05-baby" and str(second.path) == f"{first.path}-2"


def test_a_log_cut_short_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_text_is_printed_as_it_is(capsys):
    text = "x[bold]y[/bold] [/] " + "long " * 40
    line(Console(width=80), text)
    assert capsys.readouterr().out == text + "\n"


def test_the_bar_shows_loss_rate_and_time_left(settings):
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    train(TrainConfig(**settings), console=console)
    said = console.file.getvalue()
    assert "loss" in said and "tokens/s" in said and "left" in said and "20/20" in said
