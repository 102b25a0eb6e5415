"""Files and folders that several processes want at once: temporary names, locks on the folders of runs and shards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny
from tiny_run import finish, run, settings_in

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.files import LOCK, exclusive, write_atomically
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.trainer import Trainer

HOLD = "import sys, pathlib\nfrom fastgpt2.gpt2.files import exclusive\nwith exclusive(pathlib.Path(sys.argv[1])):\n"
posix = pytest.mark.skipif(os.name != "posix", reason="needs flock")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)


@pytest.fixture
def holder(tmp_path):
    """hold(folder): another process has that folder until it is killed -> the process."""
    started = []

    def hold(folder):
        code = HOLD + "    print('held', flush=True)\n    sys.stdin.read()"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def kill(process):
    process.kill()
    process.wait()


# ------------------------------------------------------------------------------------------------------------ locks


@posix
def test_a_folder_is_one_processes_and_free_when_that_is_killed(tmp_path, holder):
    process = holder(tmp_path / "new" / "folder")
    with pytest.raises(BlockingIOError, match=f"folder is in use by process {process.pid} on ") as error:
        with exclusive(tmp_path / "new" / "folder"):
            pass
    assert "give another folder" in str(error.value)
    kill(process)
    with exclusive(tmp_path / "new" / "folder"):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), exclusive(tmp_path / "new" / "folder"):
            pass
    with exclusive(tmp_path / "new" / "folder"):
        pass


@posix
def test_a_disk_without_locks_has_none(tmp_path, monkeypatch):
    import fcntl

    def refused(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    with exclusive(tmp_path), exclusive(tmp_path):
        pass


@posix
def test_a_run_in_use_is_not_resumed_nor_begun_again(tmp_path, holder):
    settings = {**settings_in(tmp_path), "steps": 2}
    folder = run(settings)[0].folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    process = holder(folder)
    with pytest.raises(BlockingIOError, match="run is in use by process"):
        finish(None, resume=folder)
    assert {path: path.read_bytes() for path in before} == before
    fresh = tmp_path / "fresh"
    other = holder(fresh)
    with pytest.raises(BlockingIOError, match="fresh is in use by process"):
        run({**settings, "out": str(fresh)})
    for held in (process, other):
        kill(held)
    finish(None, resume=folder)
    run({**settings, "out": str(fresh)})


@posix
def test_a_run_holds_its_folder_until_it_ends(tmp_path, monkeypatch):
    settings, seen = settings_in(tmp_path), []

    def step(self, at, original=Trainer.step):
        with pytest.raises(BlockingIOError), exclusive(Path(settings["out"])):
            pass
        seen.append(at)
        if at == 3:
            raise RuntimeError("the end")
        return original(self, at)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="the end"):
        run(settings)
    with pytest.raises(RuntimeError, match="the end"):
        finish(None, resume=Path(settings["out"]))
    with exclusive(Path(settings["out"])):
        assert seen == [1, 2, 3, 1, 2, 3]


@posix
def test_two_preparations_of_one_folder_are_one(tmp_path, holder):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    source = find_source(tmp_path / "a.txt")
    process = holder(tmp_path / "out")
    with pytest.raises(BlockingIOError, match="out is in use by process"):
        prepare(source, tmp_path / "out", "byte", processes=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    kill(process)

    def meanwhile(*args):
        with pytest.raises(BlockingIOError, match="out is in use by process"):
            prepare(source, tmp_path / "out", "byte", processes=1)

    assert prepare(source, tmp_path / "out", "byte", processes=1, report=meanwhile).n_documents == 1


def test_the_command_says_who_uses_the_folder(tmp_path, capsys):
    with exclusive(tmp_path / "run"):
        assert cli.main(["train", "--out", str(tmp_path / "run"), "--preset", "gpt2-smoke", "--device", "cpu"]) == 2
    assert f"run is in use by process {os.getpid()}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- temporary names


def planted(monkeypatch, folder, victim):
    """Links to `victim` at every temporary name that could be foreseen."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "foreseen")
    for name in ("a.txt", "model.safetensors", "config.json"):
        (folder / f".{name}.foreseen.tmp").symlink_to(victim)


@posix
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    planted(monkeypatch, tmp_path, tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a.txt", "new")
    with pytest.raises(FileExistsError):
        tiny().save_pretrained(tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"


def test_temporary_names_differ_and_go(tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: names.append(Path(a).name) or replace(a, b))
    for _ in range(2):
        write_atomically(tmp_path / "a.txt", "text")
    assert len(set(names)) == 2 and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "text"
    shutil.rmtree(tmp_path)
    write_atomically(tmp_path / "a.txt", b"again")
    monkeypatch.setattr(os, "replace", lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "a.txt", b"more")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"again")]
