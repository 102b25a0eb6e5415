"""Settings: presets, files, the command line over both, and what is refused."""

import dataclasses
import math
import re

import pytest
import torch

from fastgpt2 import GPTConfig
from fastgpt2.gpt2.cli.train import parse
from fastgpt2.gpt2.training.optim import wsd_schedule
from fastgpt2.gpt2.training.train import train
from fastgpt2.gpt2.training.train_config import PRESETS, TrainConfig, choose_preset, read_settings, settings_text


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0), dict(batch_size=0), dict(total_batch_tokens=0), dict(eval_interval=0), dict(eval_tokens=0),
        dict(lr=0.0), dict(lr=math.nan), dict(grad_clip=-1.0), dict(min_lr=-1.0), dict(warmup=-1),
        dict(weight_decay=-0.1), dict(beta2=1.0), dict(val_fraction=0.0), dict(seed=-1),
        dict(dtype="float8"), dict(dropout=1.0), dict(schedule="linear"), dict(decay_fraction=0.0),
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        TrainConfig(**wrong)


# ---------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name):
    config = TrainConfig.from_preset(name)
    assert config.preset == name and 0 < config.min_lr < config.lr
    if name.startswith("gpt2") and not name.endswith("-smoke"):
        assert config.tokens_per_step() == 2**19
    assert f"{name.removesuffix('-smoke')}-smoke" in PRESETS
    assert TrainConfig.from_preset(name, steps=7).steps == 7


def test_presets_have_the_models_sizes():
    for name in ("baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        ours, theirs = TrainConfig.from_preset(name).model_config(50257), GPTConfig.preset(name)
        for size in ("n_layer", "n_head", "n_embd", "block_size"):
            assert getattr(ours, size) == getattr(theirs, size)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset 'babby' is unknown, there are baby, baby-smoke, gpt2"):
        TrainConfig.from_preset("babby")


def test_without_a_gpu_the_small_size_is_chosen():
    name, remark = choose_preset(None, torch.device("cpu"))
    assert name == "baby-smoke" and "no GPU" in remark
    assert choose_preset("baby", torch.device("cpu")) == ("baby", "made for a GPU; baby-smoke is made for a CPU")


def test_gpt2_is_the_reproduction_of_124m():
    config = TrainConfig.from_preset("gpt2")
    wanted = dict(
        total_batch_tokens=524_288, steps=19_073, schedule="cosine", lr=6e-4, min_lr=6e-5, warmup=715, beta2=0.95,
        weight_decay=0.1, grad_clip=1.0, block_size=1024, dropout=0.0, tokenizer=None,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.text_tokenizer() == "gpt2"
    assert config.steps * config.tokens_per_step() == pytest.approx(10e9, rel=1e-4)


# ----------------------------------------------------------------------------------------------- passes and schedules


def test_passes_follow_from_the_tokens_of_a_step():
    config = TrainConfig.from_preset("gpt2", batch_size=16)
    assert [config.grad_accum_steps(ranks) for ranks in (1, 2, 8)] == [32, 16, 4]
    assert {config.tokens_per_step(ranks) for ranks in (1, 2, 8)} == {2**19}
    with pytest.raises(ValueError, match="total_batch_tokens is 524288.*16 x block_size 1024 x 3 ranks = 49152"):
        config.grad_accum_steps(3)
    with pytest.raises(ValueError, match="total_batch_tokens is 100, allowed are multiples of"):
        TrainConfig(total_batch_tokens=100)
    alone = TrainConfig(batch_size=2, block_size=8)
    assert alone.grad_accum_steps(4) == 1 and alone.tokens_per_step(4) == 64


def test_every_preset_of_gpt2_runs_on_eight_processes():
    for name in PRESETS:
        if name.startswith("gpt2"):
            assert len({TrainConfig.from_preset(name).tokens_per_step(ranks) for ranks in (1, 2, 4, 8)}) == 1


def test_wsd_rises_stays_and_falls():
    rates = [wsd_schedule(s, peak=1.0, floor=0.1, warmup=4, steps=20, decay=5) for s in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


# ------------------------------------------------------------------------------------------------------------- files


def test_the_command_line_goes_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: gpt2-smoke\nlr: 1e-4\nwarmup: 7\ncompile: true\ndata: null\n")
    config, *_ = parse(["--config", str(file), "--warmup=9", "--device", "cpu"])
    assert config == TrainConfig.from_preset("gpt2-smoke", lr=1e-4, warmup=9, compile=True, device="cpu")
    config, *_ = parse([f"--config={file}", "--preset", "baby", "--no-compile", "--data", "x"])
    assert config == TrainConfig(lr=1e-4, warmup=7, data="x")


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_their_file(name, tmp_path):
    config = TrainConfig.from_preset(name, out="somewhere", data="a: 'b'", lr=1e-4 / 3, min_lr=1e-7)
    (tmp_path / "config.yaml").write_text(settings_text(config))
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == dataclasses.replace(config, out=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stesp: 3", "setting 'stesp' is unknown, there are preset,"),
        ("- 3", "has no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_files_that_do_not_work_are_named(content, message, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"run.yaml.*{message}"):
        read_settings(tmp_path / "run.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config is '.*none.yaml', which does not exist"):
        parse(["--config", str(tmp_path / "none.yaml")])


def test_a_value_of_the_wrong_type_is_refused(tmp_path):
    for content, message in (
        ("lr: 0.1\nsteps: many", "run.yaml, line 2: steps is 'many', expected a whole number"),
        ("lr: true", "lr is 'true', expected a number"),
        ("steps: 1.5", "steps is '1.5', expected a whole number"),
        ("steps: null", "steps is 'null', which YAML reads as null"),
        ("compile: 1", "compile is '1', allowed are true and false"),
        ("bad_steps: no", "bad_steps is 'no', allowed are stop, skip"),
        ("data: [a, b]", "data has several values"),
        ("lr: 0.1\nsteps: 3\nlr: 0.2", "line 3: setting 'lr' is given twice"),
    ):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match="^--steps is 'many', expected a whole number$"):
        parse(["--steps", "many"])


def test_a_value_out_of_range_names_the_file_it_stands_in(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: -1\npreset: gpt3\n")
    with pytest.raises(ValueError, match="run.yaml: lr is -1.0, allowed are"):
        parse(["--config", str(tmp_path / "run.yaml"), "--preset", "baby"])
    with pytest.raises(ValueError, match="^lr is -2.0, allowed are"):
        parse(["--config", str(tmp_path / "run.yaml"), "--preset", "baby", "--lr", "-2"])
    with pytest.raises(ValueError, match="^preset 'gpt3' is unknown"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_words_that_yaml_takes_for_something_else_are_what_the_setting_is(tmp_path):
    (tmp_path / "run.yaml").write_text("cuda_graph: off\nlr: 1e-3\ndata: 1984\nout: no\ncompile: yes\nkernels: --x\n")
    config, *_ = parse(["--config", str(tmp_path / "run.yaml"), "--preset", "baby", "--device", "cpu"])
    assert (config.cuda_graph, config.lr, config.data, config.out) == ("off", 1e-3, "1984", "no")
    assert config.compile is True and config.kernels == "--x"


def test_a_run_that_goes_on_has_no_other_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    assert parse(["--resume", str(tmp_path), "--out", f"{tmp_path}/."])[2] == str(tmp_path)
    with pytest.raises(ValueError, match="out is 'elsewhere', and .* goes on where it is: leave out out"):
        train(parse(["--resume", str(tmp_path), "--out", "elsewhere"]).config, resume=tmp_path)
