"""What a run tells while it goes, and the curves of several runs in one picture."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import failed
from tiny_run import finish, run, settings_in

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.training import plot, trainer
from fastgpt2.gpt2.training.log import read_log
from fastgpt2.gpt2.training.plot import Curve, plot_runs
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import Trainer


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
    return {**settings_in(tmp_path), "steps": 4, "eval_interval": 2}


# ----------------------------------------------------------------------------------------------------- each step


def test_mfu_is_the_models_flops_over_the_peak(settings, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e9)
    result, log, said = run(settings)
    for record in log:
        flops = result.model.config.flops_per_token() * 64
        assert record["mfu"] == pytest.approx(flops / (record["step_ms"] / 1e3) / 1e9)
    assert f"MFU {log[-1]['mfu']:.1%}" in said and "(6 N + 12 L H D T) x tokens/s / peak (PaLM" in said


def test_an_unknown_peak_is_said_and_gives_no_number(settings):
    _, log, said = run(settings)
    assert "peak of cpu unknown" in said and not any("mfu" in record for record in log)


def test_peak_memory_is_this_process_own(settings):
    before = hardware.peak_memory_bytes(torch.device("cpu"))
    large = torch.ones(before // 4 + 2**26)  # as many bytes as before and 256 MiB
    assert hardware.peak_memory_bytes(torch.device("cpu")) >= before + 2**26, large.shape
    record = run(settings)[1][-1]
    assert record["peak_memory_bytes"] >= before


def test_the_rate_leaves_validation_out(settings, monkeypatch):
    """On a clock that only validation and one pass of a step move."""
    clock = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])

    def taking(seconds, original):
        def timed(*args, **more):
            clock[0] += seconds
            return original(*args, **more)

        return timed

    monkeypatch.setattr(Trainer, "_accumulate_gradient", taking(0.5, Trainer._accumulate_gradient))
    monkeypatch.setattr(Trainer, "validation_loss", taking(100.0, Trainer.validation_loss))
    assert [r["step_ms"] for r in run(settings)[1]] == [500.0] * 4


# ------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_has_every_number_once(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, log, _ = run(settings, tensorboard=True)
    finish(None, resume=result.folder)
    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "val_loss"):
        scalars = [(e.step, e.value) for e in events.Scalars(name)]
        assert scalars == [(r["step"], pytest.approx(r[name])) for r in log if name in r]


def test_wandb_gets_settings_and_numbers(settings, monkeypatch):
    calls = []
    session = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **how: calls.append(how) or session
    stand_in.errors = types.SimpleNamespace(Error=KeyError)
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    result, log, _ = run(settings, wandb=True)
    how, *steps, last = calls
    assert how["name"] == "run" and how["resume"] == "allow" and how["config"]["lr"] == 1e-2
    assert last == "finished" and [step for step, _ in steps] == [1, 2, 3, 4]
    assert steps[1][1] == {k: v for k, v in log[1].items() if k != "step"}
    finish(None, resume=result.folder)
    another = run({**settings, "out": str(result.folder) + "-2"}, wandb=True)
    ids = [call["id"] for call in calls if isinstance(call, dict)]
    assert ids[0] == ids[1] != ids[2], f"a run that goes on is the same one, another is not: {another[0].folder}"


def test_a_tracker_that_cannot_be_used_leaves_no_folder(settings, monkeypatch):
    def no_key(**how):
        raise KeyError("No API key configured. Use `wandb login`")

    stand_in = types.ModuleType("wandb")
    stand_in.init, stand_in.errors = no_key, types.SimpleNamespace(Error=KeyError)
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(RuntimeError, match="wandb is True, but it cannot be used: .*No API key.*WANDB_MODE=offline"):
        run(settings, wandb=True)
    assert not Path(settings["out"]).exists()


def test_a_package_that_is_missing_is_named_before_anything_is_written(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wandb is True.*pip install 'fastgpt2\[watch\]'"):
        run(settings, wandb=True)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- plots


def written(folder, losses, **more):
    """A run's folder with a log of these losses."""
    folder.mkdir()
    records = [
        dict(step=i + 1, tokens=100 * (i + 1), loss=loss, step_ms=3.6e6, **{k: v[i] for k, v in more.items()})
        for i, loss in enumerate(losses)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_curve_is_the_log(tmp_path):
    curve = Curve.read(written(tmp_path / "a", [3.0, None, 1.0], val_loss=[None, 2.0, None]))
    assert curve.name == "a" and curve.tokens.tolist() == [100, 200, 300] and curve.hours.tolist() == [1, 2, 3]
    np.testing.assert_equal(curve.loss, [3, np.nan, 1])
    np.testing.assert_equal(curve.val_loss, [np.nan, 2, np.nan])


def test_runs_are_overlaid(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, png: figures.append(figure))
    a = written(tmp_path / "a", np.linspace(4, 3, 200).tolist())
    b = written(tmp_path / "b", [4.0, 3.5], hellaswag=[0.25, 0.3])
    plot_runs([a, b, tmp_path / "." / "a"], tmp_path / "x.png", {"GPT-2": 3.29})  # each once
    tokens, hours, score = figures[0].axes
    for axes in (tokens, hours):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["a, training", "b, training", "GPT-2: 3.29"]
    assert [text.get_text() for text in score.get_legend().get_texts()][0] == "b"
    assert score.lines[0].get_ydata().tolist() == [0.25, 0.3]
    mean = tokens.lines[1]
    assert len(mean.get_xdata()) == 197 and mean.get_ydata()[0] == pytest.approx(np.linspace(4, 3, 200)[:4].mean())
    plot_runs([a], tmp_path / "x.png")
    assert len(figures[1].axes) == 2, "no panel for what was not scored"


@pytest.mark.parametrize(
    ("hours", "unit", "value"),
    [
        (0.1, "minutes", 6),
        (1.5, "minutes", 90),
        (2, "hours", 2),
        (47, "hours", 47),
        (72, "days", 3),
        (0.02, "seconds", 72),
    ],
)
def test_time_has_a_unit_that_fits(tmp_path, monkeypatch, hours, unit, value):
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, picture: figures.append(figure))
    folder = written(tmp_path / "a", [4.0, 3.0])
    log = (folder / "log.jsonl").read_text().replace("3600000.0", str(hours / 2 * 3.6e6))
    (folder / "log.jsonl").write_text(log)
    plot_runs([folder], tmp_path / "x.png")
    axes = figures[0].axes[1]
    assert axes.get_xlabel() == f"{unit} of training" and axes.lines[0].get_xdata()[-1] == pytest.approx(value)


@pytest.mark.parametrize(("name", "begin"), [("x.png", b"\x89PNG"), ("x.pdf", b"%PDF-"), ("x.svg", b"<?xml")])
def test_a_picture_is_what_its_name_says(tmp_path, name, begin):
    a = written(tmp_path / "a", [4.0, 3.0])
    assert cli.main(["plot", str(a), "--out", str(tmp_path / name)]) == 0
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begin) and (b"<svg" in content) == name.endswith("svg")


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.png.jpg"])
def test_a_name_that_says_no_picture_is_refused(tmp_path, capsys, name):
    a = written(tmp_path / "a", [4.0, 3.0])
    said = failed(capsys, "plot", str(a), "--out", str(tmp_path / name))
    assert f"{name}', allowed are names that end in .pdf, .png, .svg" in said and not (tmp_path / name).exists()


def test_the_command_writes_a_picture(tmp_path, capsys):
    from matplotlib.image import imread

    a = written(tmp_path / "a", [4.0, 3.0], val_loss=[None, 3.1])
    out = tmp_path / "runs.png"
    assert cli.main(["plot", str(a), "--out", str(out), "--reference", "a=b=3.5"]) == 0
    picture = imread(out)
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.01
    assert capsys.readouterr().out.strip() == str(out)
    (tmp_path / "b").mkdir()
    assert f"{tmp_path / 'b'} is not the folder of a run: it has no log.jsonl" in failed(
        capsys, "plot", str(tmp_path / "b")
    )
    (tmp_path / "b" / "log.jsonl").touch()
    assert "has no steps yet" in failed(capsys, "plot", str(tmp_path / "b"))
    assert read_log(tmp_path / "b" / "log.jsonl") == []


@pytest.mark.parametrize("reference", ["3.5", "=3.5", "GPT-2=low"])
def test_a_reference_that_is_none_is_refused(reference, capsys):
    assert cli.main(["plot", "x", "--reference", reference]) == 2
    assert f"--reference is {reference!r}, expected NAME=LOSS" in capsys.readouterr().err


def test_a_folder_with_dollars_in_its_name_is_drawn_and_goes_on(tmp_path):
    """matplotlib reads $...$ as a formula."""
    _, log, said = run({**settings_in(tmp_path), "out": str(tmp_path / "$x_$y")}, steps=2)
    assert len(log) == 2 and (tmp_path / "$x_$y" / "loss.png").is_file() and "trained before" not in said
    assert "all 2 steps were trained before" in finish(None, resume=tmp_path / "$x_$y")[2]


def test_a_folder_whose_name_is_no_text_is_refused_before_anything(tmp_path):
    with pytest.raises(ValueError, match="out is '.*', which is not UTF-8 text"):
        run({**settings_in(tmp_path), "out": str(tmp_path / "\udcff")}, steps=2)
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
