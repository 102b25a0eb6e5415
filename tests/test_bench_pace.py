"""`fastgpt2 bench` without a command takes about four minutes on any CPU, and says what it left out for that."""

import types

import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.timing import pace
from fastgpt2.bench.timing.timing import Timing

CPU = torch.device("cpu")
FAST, SLOW, SLOWEST = pace.Speed(1e12, 1e11), pace.Speed(2e10, 4e9), pace.Speed(3e8, 6e7)


def clock(monkeypatch, verify_s: float, green: bool = True):
    """Time stands still but for verify, and for what `tick` adds."""
    now = types.SimpleNamespace(s=0.0)

    def verified(device):
        now.s += verify_s
        return green

    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now.s))
    monkeypatch.setattr(pace.gate, "verified", verified)
    return now


def all_choices(speed: pace.Speed, verify_s: float) -> list[pace.Choice]:
    return [
        c for choices in (pace.train_choices, pace.ops_choices, pace.generate_choices) for c in choices(speed, verify_s)
    ]


def lines(monkeypatch, speed: pace.Speed, verify_s: float, slower: float = 1.0) -> list[list[str]]:
    """What runs on a machine whose commands take `slower` times as long as estimated."""
    now = clock(monkeypatch, verify_s)
    monkeypatch.setattr(pace.Speed, "measured", lambda: speed)
    every = all_choices(speed, verify_s)
    seconds = {tuple(choice.line): choice.seconds for choice in every}
    ran = []
    for line in pace.default_lines(CPU):
        ran.append(line)
        now.s += slower * seconds.get(tuple(line), 0.0)
    assert now.s <= pace.WHOLE_S or slower > 1 or len(ran) == 2
    return ran


def test_a_fast_cpu_measures_all_that_quick_does(monkeypatch, capsys):
    train, ops, generate, report = lines(monkeypatch, FAST, verify_s=10)
    assert "--road" not in train and train[2:6] == ["--batch", "4", "--block", "256"]
    assert ops == ["ops", "--quick", "--shape", "256x768"] and report == ["report"]
    assert generate[:6] == ["generate", "--quick", "--size", "gpt2", "--new", "64"]
    said = capsys.readouterr().out
    assert "1e+03 GFLOP/s" in said and "left out" not in said and "smaller" not in said


def test_a_slow_one_measures_less_and_says_so(monkeypatch, capsys):
    train, ops, generate, _ = lines(monkeypatch, SLOW, verify_s=60)
    assert "4" not in train and ops != ["ops", "--quick", "--shape", "256x768"] and "64" not in generate
    said = capsys.readouterr().out
    assert said.count("smaller than") == 3 and "fastgpt2 bench train --quick --batch" in said


def test_the_slowest_one_measures_a_step_and_says_what_is_left_out(monkeypatch, capsys):
    train, report = lines(monkeypatch, SLOWEST, verify_s=300)
    assert train[2:6] == ["--batch", "1", "--block", "64"] and train[-2:] == ["--road", "launched"]
    said = capsys.readouterr().out
    assert "left out: fastgpt2 bench ops --quick, which takes about" in said and "0 s of 240 are left" in said
    assert "left out: fastgpt2 bench generate --quick" in said


def test_what_takes_longer_than_estimated_leaves_less_for_the_rest(monkeypatch):
    usual, late = (lines(monkeypatch, SLOW, verify_s=60, slower=slower) for slower in (1.0, 1.7))
    seconds = {tuple(choice.line): choice.seconds for choice in all_choices(SLOW, 60)}
    usual_s, late_s = (sum(seconds[tuple(line)] for line in ran[:-1]) for ran in (usual, late))
    assert late[0] == usual[0] and late_s < usual_s


def test_a_red_verify_measures_nothing(monkeypatch):
    clock(monkeypatch, verify_s=10, green=False)
    monkeypatch.setattr(pace.Speed, "measured", lambda: pytest.fail("measured"))
    assert list(pace.default_lines(CPU)) == [["train", "--quick"]], "whose own check ends the run with an error"


def test_a_gpu_runs_every_quick_command():
    assert tuple(pace.default_lines(torch.device("cuda"))) == pace.COMPLETE


def test_every_line_is_one_that_its_command_takes(monkeypatch):
    ran = []
    for module in bench.COMMANDS:
        monkeypatch.setattr(module, "main", lambda options: ran.append(options) or 0)
    every = all_choices(SLOW, 1.0)
    for choice in every:
        assert bench.main(choice.line) == 0
    assert len(ran) == len(every) and all(options.quick for options in ran)


def test_speed_is_work_over_time(monkeypatch):
    times = {"all": Timing((20.0,)), "one": Timing((4.0,))}

    def measure(passes, device, **budget):
        assert [call()[0].shape[:2] for call in passes.values()] == [(1, 1), (1, 1)], "logits of the last token"
        return times

    monkeypatch.setattr(pace.timing, "measure", measure)
    speed = pace.Speed.measured()
    N, model = pace.TOKENS, pace.MEASURED
    assert speed.flops == pytest.approx(model.flops_per_token(N) / 3 * N / 0.02)
    assert speed.weight_bytes == pytest.approx(4 * model.num_params() / 0.004)
