"""Runs that die before any operation on a file of theirs: all go on, none is stuck, and all end as if nobody had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import finish, run, settings_in

from fastgpt2.gpt2.training.run_folder import CONFIG
from fastgpt2.gpt2.weights.checkpoints import damage, saved_checkpoints

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
MORE = dict(steps=4, eval_interval=2, keep=1, block_size=8, n_embd=8, eval_tokens=16)


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """(settings, folders of runs that were killed: of the n-th before its n-th operation)."""
    folder = tmp_path_factory.mktemp("killed")
    settings = {**settings_in(folder), **MORE}
    worker = Path(__file__).with_name("every_kill.py")
    (folder / "settings.json").write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, str(worker), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return settings, sorted((f for f in folder.glob("kill-*")), key=lambda f: int(f.name[5:]))


def test_all_go_on(deaths, tmp_path):
    settings, folders = deaths
    whole, log, _ = run({**settings, "out": str(tmp_path / "whole")})
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    losses = [record["loss"] for record in log]
    assert len(folders) > 60
    again = 0
    for folder in folders:
        if (folder / CONFIG).is_file():
            result, log, _ = finish(None, resume=folder)
        else:  # the same command
            result, log, _ = run({**settings, "out": str(folder)})
            again += 1
        assert [record["loss"] for record in log] == losses, folder
        assert all(torch.equal(value, expected[name]) for name, value in result.model.state_dict().items()), folder
        assert saved_checkpoints(folder)[0].name == "step-00000004", folder
        assert damage(folder / "checkpoint") is None, folder
        left = [f.name for f in folder.rglob("*") if f.name.endswith((".tmp", ".unfinished"))]
        assert not left, (folder, left)
    assert 5 < again < len(folders) // 2
