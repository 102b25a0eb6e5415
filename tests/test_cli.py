"""The command `fastgpt2`, typed as a user types it."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.cli import sample as sample_command
from fastgpt2.gpt2.training.progress import shell_word
from fastgpt2.gpt2.training.train_config import TrainConfig

SMALL = (
    "--steps 4 --batch-size 2 --block-size 16 --n-layer 1 --n-head 1 --n-embd 16 --eval-interval 2 --eval-tokens 32 "
    "--device cpu"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("some words, and more of them\n" * 50)
    assert cli.main(["train", *SMALL, "--data", str(folder / "text.txt"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def failed(capsys, *args) -> str:
    """The one line that a mistake ends with."""
    assert cli.main([*args]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("fastgpt2: error: ")
    return err


# --------------------------------------------------------------------------------------------------------- train


def test_train_writes_a_run(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "about.json", "log.jsonl", "checkpoint", "checkpoints", "loss.png", ".fastgpt2.lock",
    }  # fmt: skip


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        # The option, its values, and a help that does not begin with the default: a comment is there.
        assert re.search(rf" {option}(, --no\S+| \S+) [^(-][^()]+.*?\(default: ", said), option


@pytest.fixture
def no_measurement(monkeypatch):
    monkeypatch.setattr("fastgpt2.gpt2.cli.train.fitted", lambda config: (config, 1.0))


def test_options_reach_the_config(monkeypatch, no_measurement):
    seen = []
    result = types.SimpleNamespace(stopped_by=None)
    monkeypatch.setattr(
        "fastgpt2.gpt2.training.train.train", lambda config, resume, console: seen.append(config) or result
    )
    assert cli.main(["train"]) == 0
    assert cli.main("train --preset gpt2 --lr 1e-5 --min-lr 1e-6 --compile --data x --steps 3".split()) == 0
    assert cli.main("train --device cpu --no-compile --kernels attention,mlp".split()) == 0
    default, second, third = seen
    assert default.preset in ("baby", "baby-smoke")
    assert second == TrainConfig.from_preset("gpt2", lr=1e-5, min_lr=1e-6, compile=True, data="x", steps=3)
    assert third == TrainConfig.from_preset("baby-smoke", device="cpu", compile=False, kernels="attention,mlp")


def test_the_choice_of_size_is_explained(monkeypatch, capsys, no_measurement):
    result = types.SimpleNamespace(stopped_by=None)
    monkeypatch.setattr("fastgpt2.gpt2.training.train.train", lambda config, resume, console: result)
    cli.main(["train", "--device", "cpu"])
    assert "baby-smoke (no GPU" in capsys.readouterr().out


def test_a_stopped_run_has_the_signals_status(monkeypatch, no_measurement):
    result = types.SimpleNamespace(stopped_by=signal.SIGTERM)
    monkeypatch.setattr("fastgpt2.gpt2.training.train.train", lambda config, resume, console: result)
    assert cli.main(["train"]) == 128 + 15


def test_a_run_is_resumed_with_its_own_settings(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    assert cli.main(["train", "--resume", str(copy)]) == 0
    assert f"resumes {copy}" in capsys.readouterr().out
    assert "lr is 0.5, the run" in failed(capsys, "train", "--resume", str(copy), "--lr", "0.5")


def test_the_next_command_is_one_that_bash_passes_on(run, tmp_path, capsys):
    """What is printed at the end of a run, taken by bash, is what was meant."""
    prompts = ["\n", "def ", "it's\t$HOME `x` \\n", "\x1b[0m!", "é 'q' \"", "a\nb'c"]
    words = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + " ".join(map(shell_word, prompts))], capture_output=True, check=True
    )
    assert words.stdout.decode().split("\0")[:-1] == prompts
    capsys.readouterr()
    copy = shutil.copytree(run, tmp_path / "a run", symlinks=True)
    assert cli.main(["train", "--resume", str(copy)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("more")]
    code = "import sys; sys.argv.pop(0); print(sys.argv)\n"
    fastgpt2 = f"fastgpt2() {{ {sys.executable} -c '{code}' \"$@\"; }}; "
    seen = subprocess.run(["bash", "-c", fastgpt2 + line.removeprefix("more")], capture_output=True, text=True)
    assert seen.stdout == f"{['sample', '--checkpoint', str(copy), '--prompt', chr(10)]}\n", seen


# -------------------------------------------------------------------------------------------------------- sample


def test_sample_writes_text(run, capsys):
    args = ["sample", "--checkpoint", str(run), "--prompt", "some w", "--max-new-tokens", "10"]
    assert cli.main([*args, "--num", "3", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    texts = first.split(f"\n{sample_command.RULE}\n")
    assert len(texts) == 3 and all(t.startswith("some w") for t in texts)
    assert cli.main([*args, "--num", "3", "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*args, "--greedy", "--kernels", "torch", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out) == len("some w") + 10 + 1


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--temperature", "0"], "temperature is 0.0"),
        (["--prompt", "a", "--top-k", "0"], "top_k is 0"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--num", "0"], "num is 0"),
        (["--prompt", "a", "--max-new-tokens", "-5"], "max_new_tokens is -5"),
        (["--prompt", "a", "--kernels", "atention"], "'atention'"),
        (["--prompt", "a", "--device", "warp"], "device is 'warp', allowed are auto, cpu, cuda, cuda:1 and others"),
        (["--prompt", "a", "--greedy", "--top-k", "3"], "--top-k is 3 and --greedy takes the likeliest token"),
        (["--prompt", "a", "--greedy", "--temperature", "1"], "--temperature is 1.0 and --greedy takes"),
    ],
)
def test_mistakes_in_sampling_are_one_line(run, capsys, args, message):
    capsys.readouterr()
    assert message in failed(capsys, "sample", "--checkpoint", str(run), *args)


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path, capsys):
    said = failed(capsys, "sample", "--checkpoint", str(tmp_path), "--prompt", "a")
    assert str(tmp_path) in said and "no checkpoint" in said


def test_mistakes_in_training_are_one_line(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    for args, message in (
        (["--data", str(tmp_path / "none")], "no such file or folder"),
        (["--data", str(tmp_path / "short.txt")], "the data has 5 tokens"),
        (["--steps", "0"], "steps is 0"),
        (["--preset", "babby"], "preset 'babby' is unknown"),
        (["--schedule", "wsd", "--decay-fraction", "2"], "decay_fraction is 2.0"),
        (["--n-head", "5", "--device", "cpu"], "divisible by n_head"),
        (["--lr", "1e-5", "--min-lr", "1e-4"], "min_lr is 0.0001, allowed are numbers up to lr, which is 1e-05"),
        (["--parallel", "fsdp", "--device", "cpu"], "parallel is 'fsdp' and there is one process"),
    ):
        assert message in failed(capsys, "train", *args)


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgpt2 {metadata.version('fastgpt2')}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no command is given, there are train, plot, sample, "),
        (["tarin"], "fastgpt2 has no command 'tarin', the nearest is train; there are train, plot, "),
        (["--vresion"], "fastgpt2 has no option --vresion, the nearest is --version"),
        (["train", "--stesp", "3"], "fastgpt2 train has no option --stesp, the nearest is --steps"),
        (["sample"], "fastgpt2 sample needs --checkpoint RUN|FOLDER|NAME: fastgpt2 sample --help says more"),
        (["bench", "tran"], "fastgpt2 bench has no command 'tran', the nearest is train; there are train, generate, "),
    ],
)
def test_mistyped_commands_are_one_line(args, message, capsys):
    assert message in failed(capsys, *args)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("word", ["--version", "--help"])
def test_a_full_standard_output_is_named(word):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastgpt2.gpt2", word]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "fastgpt2: error: standard output: No space left on device\n")


def test_a_traceback_is_there_for_the_asking(capsys):
    assert cli.main(["--traceback", "train", "--steps", "0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_has_status_130(monkeypatch, capsys):
    def interrupted(config, resume, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgpt2.gpt2.training.train.train", interrupted)
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- other commands


@pytest.mark.parametrize(
    ("name", "module"), [("verify", "fastgpt2.bench.verify.verify"), ("bench", "fastgpt2.bench.__main__")]
)
def test_other_commands_get_their_arguments(monkeypatch, name, module):
    seen = []
    stand_in = types.ModuleType(module)
    stand_in.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, module, stand_in)
    assert cli.main([name, "--help", "--x"]) == 3
    assert seen == [["--help", "--x"]]


def test_the_console_script_is_this_function():
    (script,) = metadata.entry_points(group="console_scripts", name="fastgpt2")
    assert script.load() is cli.main


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "fastgpt2.gpt2", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "sample", "verify", "bench"):
        assert f"\n  {command}" in done.stdout or f" {command} " in done.stdout
