"""How a command ends: nobody reads its output, its terminal or its launcher is gone, its disk is full, its encoding
lacks characters. A run is saved, and what is said is one line."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_run import finish, run, settings_in

from fastgpt2.gpt2 import output
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.training import stop_signals
from fastgpt2.gpt2.training.run_folder import read_log
from fastgpt2.gpt2.training.stop_signals import StopSignals
from fastgpt2.gpt2.training.train import TrainConfig, Trainer
from fastgpt2.gpt2.weights import checkpoints
from fastgpt2.gpt2.weights.checkpoints import find_corruption, saved_checkpoints

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    pytest.mark.skipif(os.name != "posix", reason="pipes, signals and limits of POSIX"),
]
QUICK = """
import sys
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.trainer import Trainer
RunFolder.plot = lambda self: None
Trainer.sample = lambda self, model, prompt: "\\u00e9\\ud7ff\\x1b]0;mine\\x07 written"
sys.exit(cli.main(sys.argv[1:]))
"""


def options_of(settings):
    """The command that trains with these settings."""
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]


def command(*arguments, before="", **more):
    return subprocess.Popen([sys.executable, "-c", before + QUICK, *arguments], stderr=subprocess.PIPE, **more)


# ----------------------------------------------------------------------------------------------------------- readers


def test_a_run_goes_on_where_nobody_reads_its_output_any_more(tmp_path):
    settings = {**settings_in(tmp_path), "steps": 100, "eval_interval": 10}
    process = command(*options_of(settings), stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    said = process.communicate()[1].decode()
    assert said == "fastgpt2: standard output is gone (Broken pipe): this goes on without it\n"
    assert process.returncode == 0 and len(read_log(tmp_path / "run" / "log.jsonl")) == 100
    assert find_corruption(saved_checkpoints(tmp_path / "run")[0]) is None


class Gone(io.StringIO):
    """A stream whose reader went away after some writes: a closed pipe, a closed terminal, a full disk."""

    def __init__(self, number, writes=2):
        super().__init__()
        self.number, self.left = number, writes

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_every_way_to_lose_standard_output_is_survived(tmp_path, monkeypatch, capsys, number):
    settings = {**settings_in(tmp_path), "steps": 4, "eval_interval": 1}
    monkeypatch.setattr(sys, "stdout", Gone(number))
    assert cli.main(options_of(settings)) == 0
    assert capsys.readouterr().err == (
        f"fastgpt2: standard output is gone ({os.strerror(number)}): this goes on without it\n"
    )
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run({**settings_in(tmp_path_factory.mktemp("trained")), "steps": 2})[0].folder


@pytest.mark.parametrize("form", [[], ["--stream"], ["--json"]], ids=str)
def test_a_sample_that_nobody_reads_ends_quietly(folder, monkeypatch, capsys, form):
    monkeypatch.setattr(sys, "stdout", Gone(errno.EPIPE, writes=1 if form == ["--stream"] else 0))
    arguments = ["sample", "--checkpoint", str(folder), "--prompt", "line", "--max-new-tokens", "30"]
    assert cli.main([*arguments, *form]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_python_itself_says_nothing_at_the_end(folder):
    process = command("sample", "--checkpoint", str(folder), "--prompt", "a", "--num", "30", stdout=subprocess.PIPE)
    process.stdout.close()
    process.stdout = None
    assert (process.communicate()[1], process.returncode) == (b"", 128 + signal.SIGPIPE)


# ---------------------------------------------------------------------------------------------------------- encodings


def test_a_finished_run_does_not_fail_for_an_encoding(tmp_path):
    settings = {**settings_in(tmp_path), "steps": 2}
    process = command(*options_of(settings), stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert rb"\xe9\ud7ff" in out and b"more   fastgpt2 sample" in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_a_text_has_learned_does_not_steer_a_terminal(folder, monkeypatch):
    wild = "a\x1b[2J\x07\x9b1m\tb\nc"
    assert output.visible(wild, io.StringIO()) == wild
    assert output.visible(wild, Terminal()) == "a\\x1b[2J\\x07\\x9b1m\tb\nc"
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: wild)
    monkeypatch.setattr(ByteTokenizer, "detokenizer", lambda self, prompt: lambda ids, final: "" if final else wild)
    arguments = ["sample", "--checkpoint", str(folder), "--prompt", "\x1bc", "--max-new-tokens", "2"]
    for form in ([], ["--stream"]):
        for stream, there in ((Terminal(), False), (io.StringIO(), True)):
            monkeypatch.setattr(sys, "stdout", stream)
            assert cli.main([*arguments, *form]) == 0
            assert ("\x1b" in stream.getvalue()) == there, form
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["eval", "--checkpoint", "no\x1b[2Jwhere", "--data", "x"]) == 2
    assert "no\\x1b[2Jwhere" in sys.stderr.getvalue()


def test_the_sample_of_a_run_does_not_either(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: "a\x1b[2Jb")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(options_of({**settings_in(tmp_path), "steps": 1})) == 0
    assert "\na\\x1b[2Jb\n" in sys.stdout.getvalue()


# ------------------------------------------------------------------------------------------------------------ signals


def test_a_terminal_that_is_closed_saves_what_stands(tmp_path, monkeypatch):
    def closed(self, at, original=Trainer.step):
        if at == 3:
            signal.raise_signal(signal.SIGHUP)
        return original(self, at)

    handler = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(Trainer, "step", closed)
    result, log, said = run(settings_in(tmp_path))
    assert result.stopped_by is signal.SIGHUP and len(log) == 3 and "stopped by SIGHUP" in said
    assert saved_checkpoints(result.folder)[0].name == "step-00000003"
    assert signal.getsignal(signal.SIGHUP) is handler


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_whose_launcher_is_gone_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_signals, "LOOK_S", 0.01)
    parent = os.getppid()
    with StopSignals(launched=True) as stop, StopSignals() as alone:
        time.sleep(0.1)
        assert stop.received is None
        monkeypatch.setattr(os, "getppid", lambda: 1 if parent != 1 else 2)
        for _ in range(500):
            if stop.received is not None:
                break
            time.sleep(0.01)
        assert stop.received is signal.SIGTERM and alone.received is None


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ranks_of_a_killed_torchrun_save_and_end(tmp_path):
    settings = {**settings_in(tmp_path), "steps": 100_000, "eval_interval": 100_000}
    (tmp_path / "train.py").write_text(QUICK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    log = tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "said", "wb") as said:
        launcher = subprocess.Popen(
            [*torchrun, str(tmp_path / "train.py"), *options_of(settings)], stdout=said, stderr=said
        )
        try:
            wait_for(lambda: log.exists() and log.stat().st_size, (tmp_path / "said").read_text)
        finally:
            launcher.kill()
            launcher.wait()
    wait_for(lambda: saved_checkpoints(tmp_path / "run"), (tmp_path / "said").read_text)
    wait_for(lambda: "stopped by SIGTERM" in (tmp_path / "said").read_text(), (tmp_path / "said").read_text)
    assert find_corruption(saved_checkpoints(tmp_path / "run")[0]) is None


def wait_for(there, said):
    for _ in range(1200):
        if there():
            return
        time.sleep(0.05)
    pytest.fail(said())


# -------------------------------------------------------------------------------------------- other numbers of ranks


def test_a_step_stays_as_large_on_another_number_of_ranks(tmp_path):
    settings = {**settings_in(tmp_path), "steps": 4, "eval_interval": 2}
    folder = run(settings)[0].folder
    newest, before = saved_checkpoints(folder)
    state = torch.load(before / "training.pt", weights_only=True)
    state["random"] *= 2  # as two ranks of batch_size 4 would have saved it
    torch.save(state, before / "training.pt")
    files = json.loads((before / "files.json").read_text())
    files["training.pt"] = checkpoints._fingerprint(before / "training.pt")
    (before / "files.json").write_text(json.dumps(files))
    shutil.rmtree(newest)
    with pytest.raises(
        ValueError, match="has 128 tokens, on 2 ranks; on 1 it would have 64: give total_batch_tokens 128"
    ):
        finish(None, resume=folder)
    result, _, said = finish(TrainConfig(**{**settings, "total_batch_tokens": 128}), resume=folder)
    assert result.steps == 4 and "4 steps of 128 tokens" in said


# --------------------------------------------------------------------------------------------------------- full disks


def limited(kilobytes):
    """No file may grow beyond this, as on a disk that is full. Python ignores the signal that comes with it."""
    return f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10}))\n"


@pytest.mark.parametrize(("kilobytes", "file"), [(60, "model.safetensors"), (130, "training.pt")])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, kilobytes, file):
    settings = {**settings_in(tmp_path), "steps": 4, "eval_interval": 2}
    process = command(*options_of(settings), before=limited(kilobytes), stdout=subprocess.DEVNULL)
    _, err = process.communicate()
    assert process.returncode == 2
    assert re.fullmatch(rf"fastgpt2: error: .*step-00000002.unfinished/{file} cannot be written.*\n", err.decode())
    result, log, _ = finish(None, resume=tmp_path / "run")  # once there is room
    assert len(log) == 4 and [f.name for f in saved_checkpoints(result.folder)] == ["step-00000004", "step-00000002"]


def test_errors_name_no_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=r"'[^']*/taken'$") as error:
        write_atomically(tmp_path / "taken", "text")
    assert error.value.filename == str(tmp_path / "taken") and error.value.filename2 is None

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("open", "fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: '.*/a.txt'"):
            patch.setattr(os, name, full)
            write_atomically(tmp_path / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_error_of_the_system_is_a_file_and_a_reason(folder, tmp_path, capsys):
    (tmp_path / "taken.png").mkdir()
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "taken.png")]) == 2
    assert capsys.readouterr().err == f"fastgpt2: error: {tmp_path / 'taken.png'}: Is a directory\n"


# --------------------------------------------------------------------------------------------------------------- said


def test_a_warmup_longer_than_the_run_is_said(tmp_path):
    settings = {**settings_in(tmp_path), "steps": 2, "lr": 0.01}
    assert "warmup  5 steps, which the run's 2 end within: its highest rate is 4.00e-03" in run(settings)[2]
    assert "warmup  " not in run({**settings, "warmup": 1, "out": str(tmp_path / "other")})[2]
