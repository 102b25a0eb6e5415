"""Result files hold what was measured and come back as they were."""

import dataclasses
import json

import pytest
import torch

from fastgpt2.bench.report import record as module
from fastgpt2.bench.report.record import Results, describe, slug
from fastgpt2.bench.timing.timing import Timing

CPU = torch.device("cpu")


@pytest.fixture
def results() -> Results:
    results = Results.begin("train", CPU, dict(batch=2))
    results.add("ours", what="a step", time_ms=Timing((1.0, 2.0)).as_dict(), tokens_per_s=3.5)
    results.leave_out("triton", "no GPU")
    return results


def test_a_file_comes_back_as_it_was(results, tmp_path):
    file = results.save(tmp_path / "new")
    assert file.name == f"train-{slug(results.machine['name'])}.json"
    assert Results.load(file) == results
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_a_speed_depends_on_is_there(results):
    machine = results.machine
    assert machine["device"] == "cpu" and machine["name"] and machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results.date.endswith("+00:00") and machine["name"] in describe(machine)


def test_a_gpu_is_described_with_what_is_known():
    gpu = dict(device="cuda", gpu="NVIDIA X", gpu_bytes=80 << 30, driver="550.1", power_limit_w=350.0)
    assert describe(gpu) == "NVIDIA X, 80 GiB, driver 550.1, power limit 350 W"
    assert describe(gpu | dict(driver=None, power_limit_w=None)) == "NVIDIA X, 80 GiB"


def test_two_rows_of_one_name_are_refused(results):
    with pytest.raises(ValueError, match="'ours'"):
        results.add("ours", what="again", time_ms=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [("no JSON {", "is not JSON"), ("[]", "holds no results"), ('{"format": 1}', "holds no results")],
)
def test_other_files_are_refused(content, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Results.load(file)


def test_a_later_format_is_refused(results, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({**dataclasses.asdict(results), "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Results.load(file)


def test_commits_tell_changes_apart(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    run = module.subprocess.run
    monkeypatch.setattr(module, "HERE", tmp_path)
    assert module.commit() is None, "no checkout"
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        run([*git, *command], check=True)
    clean = module.commit()
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert module.commit() == clean + "+changes"
