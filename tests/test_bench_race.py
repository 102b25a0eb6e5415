"""`bench race`: all train the same model on the same batches, and the clock counts what users wait for."""

import bench_runs
import pytest
import torch
from bench_runs import NANOGPT_LIKE, read

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.variants import COMPILE, GRAPH, HUGGINGFACE, NANOGPT, OURS, Family, Variant
from fastgpt2.bench.report import plots, tables
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import race
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.ops import ALL_TRITON


@pytest.fixture(autouse=True)
def small(monkeypatch):
    bench_runs.make_small(monkeypatch)
    monkeypatch.setattr(race, "READ_EVERY", 2)
    monkeypatch.setattr(race, "HELD_OUT_WINDOWS", 4)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be, that is the question. " * 60)
    return file


@pytest.fixture
def nanogpt(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(NANOGPT_LIKE)
    return file


@pytest.fixture
def clock(monkeypatch):
    """A clock that computing moves: a step takes a second, the first one nine more, a check of held-out text 100."""
    now, steps = [0.0], []
    step, check = Family.step, race.Contestant._held_out_loss

    def timed_step(family, backward):
        compute = step(family, backward)
        steps.append(0)

        def timed():
            steps[-1] += 1
            now[0] += 10.0 if steps[-1] == 1 else 1.0
            return compute()

        return timed

    def timed_check(contestant, batches):
        now[0] += 100.0
        return check(contestant, batches)

    monkeypatch.setattr(Family, "step", timed_step)
    monkeypatch.setattr(race.Contestant, "_held_out_loss", timed_check)
    monkeypatch.setattr(race.time, "perf_counter", lambda: now[0])


def run(folder, text, *more) -> int:
    options = "race --device cpu --size tiny --tokenizer char --batch 2 --block 16 --dtype float32 --warmup 3".split()
    return bench.main([*options, "--data", str(text), "--out", str(folder), *more])


def test_all_train_the_same_model_on_the_same_batches(tmp_path, text, nanogpt, clock, capsys):
    assert run(tmp_path / "out", text, "--nanogpt", str(nanogpt), "--seconds", "29", "--lr", "0.01") == 0
    results = read(tmp_path / "out")
    ours, others = results.rows[0], results.rows[1:]
    assert [r["label"] for r in results.rows] == [
        "fastgpt2, PyTorch, SDPA", "nanoGPT, SDPA + compile", "HuggingFace, sdpa",
    ]  # fmt: skip
    for row in results.rows:
        seconds, made, training = zip(*row["training"], strict=True)
        assert made == (2, 4, 6, 8, 10, 12, 14, 16, 18, 20) and row["steps"] == 20
        assert seconds == (11, 13, 15, 17, 19, 21, 23, 25, 27, 29), "held-out text does not count, compilation does"
        assert row["first_s"] == 10 and row["time_ms"]["median"] == 1000 and row["tokens_per_s"]["median"] == 32
        assert len(set(training)) == 10
    for row in others:
        for name in ("training", "held_out"):
            assert [p[:2] for p in row[name]] == [p[:2] for p in ours[name]]
            losses = [[p[2] for p in r[name]] for r in (row, ours)]
            torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)
    assert ours["held_out_loss"] == ours["held_out"][-1][2] < ours["held_out"][0][2], "it learns"
    assert max(r["held_out_loss"] for r in results.rows) in results.settings.values()
    assert results.settings["held-out tokens"] == 4 * 15
    assert all(row["common_loss_s"] is not None for row in results.rows)
    assert "29 s, 20 steps: held-out loss" in capsys.readouterr().out
    assert set(plots.plots(results)) == {"Loss against seconds"}
    headers, cells = tables.table(results)
    assert dict(zip(headers, cells[0], strict=True))["s to the first step"] == "10.0"


def test_the_held_out_loss_is_checked_ten_times(tmp_path, text, clock):
    assert run(tmp_path / "out", text, "--seconds", "100") == 0
    assert [p[0] for p in read(tmp_path / "out").rows[0]["held_out"]] == [11, 21, 31, 41, 51, 61, 71, 81, 91, 101]


def test_text_and_learning_rates_are_shared(text):
    options = race.Options(data=str(text), tokenizer="char", size="tiny", batch=2, block=16, lr=0.01, warmup=4)
    course = race._course(options, torch.device("cpu"))
    first, again = course.batches(), course.batches()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(next(first), next(again), strict=True))
    idx, targets = next(first)
    assert torch.equal(targets[:, :-1], idx[:, 1:]) and (targets[:, -1] == -1).all(), "as HuggingFace shifts"
    rates = [course.learning_rate(step) for step in range(7)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


def test_another_model_is_no_contestant(tmp_path, text, monkeypatch, capsys):
    build = variants._build

    def other(name, config, weights, nanogpt):
        model = build(name, config, weights, nanogpt)
        if name == HUGGINGFACE:
            with torch.no_grad():
                model.transformer.wte.weight *= 3
        return model

    monkeypatch.setattr(variants, "_build", other)
    assert run(tmp_path / "out", text, "--seconds", "0.01") == 1
    said = capsys.readouterr()
    assert "failed: HuggingFace, sdpa: the loss of its first 2 steps is" in said.err and "tokens/s" not in said.out
    assert not (tmp_path / "out").exists()


def test_one_that_fails_is_left_out(tmp_path, text, monkeypatch, capsys):
    train = race.Contestant.train

    def fails(contestant, seconds, say):
        if contestant.family.name == HUGGINGFACE:
            raise RuntimeError("no compiler\nmore")
        train(contestant, seconds, say)

    monkeypatch.setattr(race.Contestant, "train", fails)
    assert run(tmp_path / "out", text, "--seconds", "0.01") == 0
    results = read(tmp_path / "out")
    assert [row["label"] for row in results.rows] == ["fastgpt2, PyTorch, SDPA"]
    assert dict(name="HuggingFace, sdpa", why="failed: no compiler") in results.left_out
    assert any(entry["name"] == NANOGPT and "--nanogpt" in entry["why"] for entry in results.left_out)
    monkeypatch.setattr(race.Contestant, "train", lambda *_: 1 / 0)
    assert run(tmp_path / "none", text, "--seconds", "0.01") == 1
    assert "failed: fastgpt2, PyTorch, SDPA: division by zero; Hugg" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_one_and_not_the_others(tmp_path, text, monkeypatch):
    step, made = Family.step, []

    def diverging(family, backward):
        compute = step(family, backward)
        made.append(family.name)
        return lambda: compute() * (float("nan") if family.name == OURS else 1.0)

    monkeypatch.setattr(Family, "step", diverging)
    assert run(tmp_path / "out", text, "--seconds", "0.01") == 0
    results = read(tmp_path / "out")
    assert [row["label"] for row in results.rows] == ["HuggingFace, sdpa"] and made == [OURS, HUGGINGFACE]
    assert any("is nan at step 2: try a lower --lr" in entry["why"] for entry in results.left_out)


def test_what_was_reached_before_ctrl_c_is_kept(tmp_path, text, monkeypatch, clock):
    load, calls = race.Contestant._load, []

    def interrupted(contestant, batch):
        calls.append(contestant.family.name)
        if calls.count(HUGGINGFACE) == 30:
            raise KeyboardInterrupt
        load(contestant, batch)

    monkeypatch.setattr(race.Contestant, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", text, "--seconds", "29")
    results = read(tmp_path / "out")
    assert [row["label"] for row in results.rows] == ["fastgpt2, PyTorch, SDPA", "HuggingFace, sdpa"]
    assert results.rows[1]["steps"] < results.rows[0]["steps"] and tables.table(results)
    assert set(plots.plots(results)) == {"Loss against seconds"}


def test_wrong_kernels_train_nothing(tmp_path, text, monkeypatch):
    monkeypatch.setattr(race.gate, "verified", lambda device: False)
    monkeypatch.setattr(race, "Contestant", lambda *_: pytest.fail("trained"))
    assert run(tmp_path, text) == 1


def test_ours_is_a_cuda_graph_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "TRITON_INSTALLED", True)
    results = Results.begin("race", torch.device("cpu"), {})
    gpu = race.contestants(torch.device("cuda"), True, results)
    assert gpu == [Variant(OURS, ALL_TRITON, GRAPH), Variant(NANOGPT, road=COMPILE), Variant(HUGGINGFACE)]
    assert results.left_out == []


def test_the_time_to_a_loss_is_between_two_checks():
    run = race.Run("", held_out=[(5.0, 2, 4.0), (10.0, 5, 3.0), (20.0, 9, 2.0)])
    assert run.reached_s(2.5) == pytest.approx(15.0) and run.reached_s(3.0) == pytest.approx(10.0)
    assert run.reached_s(4.5) == 5.0 and run.reached_s(1.9) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "gpt3"], "--size is 'gpt3'"),
        (["--dtype", "float16"], "--dtype is 'float16', allowed are float32, bfloat16"),
        (["--block", "1"], "--block is 1, allowed are numbers from 2"),
        (["--seed", "-1"], "--seed is -1, allowed are 0.."),
        (["--out", __file__], "and .*test_bench_race.py is a file: give a folder"),
        (["--out", f"{__file__}/x"], "and .*test_bench_race.py is a file: give a folder"),
        (["--batch", "0"], "--batch is 0"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--lr", "inf"], "--lr is inf"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--batch", "64"], "is shorter than --batch 64 windows of --block 16"),
    ],
)
def test_mistakes_are_named(tmp_path, text, args, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, text, *args)


def test_a_cpu_warms_up_for_fewer_steps():
    """Of which it makes about a hundred in a minute."""
    for options, warmup in ((race.Options(size="baby"), 10), (race.Options(size="baby", warmup=0), 0)):
        assert race._course(options, torch.device("cpu")).warmup == warmup
