"""What is said of `kernels="auto"`: only files of this architecture with these kernels count, road by road."""

from types import SimpleNamespace

import bench_results
import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import variants
from fastgpt2.bench.report import measured
from fastgpt2.bench.report.record import Results
from fastgpt2.gpt2 import ops, switches

GPU = torch.device("cuda")
NAME = bench_results.MACHINE["name"]


@pytest.fixture(autouse=True)
def invented(monkeypatch, tmp_path):
    """An invented GPU of compute capability 9.0, and no files but those of a test."""
    properties = SimpleNamespace(name=NAME, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (properties.major, properties.minor))
    monkeypatch.setattr(measured, "COMMITTED", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    return properties


def results(**machine) -> Results:
    found = bench_results.train_results()
    found.machine = found.machine | dict(capability="9.0") | machine
    found.settings[measured.DIGEST] = ops.kernels_digest()
    return found


def of_road(lines: list[str], road: str) -> str:
    (line,) = (line for line in lines[1:] if line.startswith(f"  {measured.SAID.get(road, f'torch.compile, {road}')}:"))
    return line


def test_every_road_says_what_was_measured(tmp_path):
    made = results()
    made.save(tmp_path)
    lines = measured.lines(GPU, tmp_path)
    assert len(lines) == 1 + len(variants.ROADS) and 'kernels="auto" is Triton' in lines[0]
    for road in variants.ROADS:
        row = next(r for r in made.rows if r["label"] == variants.label(ops.ALL_TRITON, road) and not r["alone"])
        assert f"{row['speedup']['median']:.2f}x of PyTorch" in of_road(lines, road)
        assert "not measured" not in of_road(lines, road) and NAME in of_road(lines, road)


@pytest.mark.parametrize("road", variants.ROADS)
def test_a_road_that_was_not_measured_says_so(tmp_path, road):
    made = results()
    made.rows = [row for row in made.rows if row["road"] != road]
    made.save(tmp_path)
    lines = measured.lines(GPU, tmp_path)
    said = f"not measured on {NAME} with these kernels; run fastgpt2 bench train"
    assert said in of_road(lines, road)
    assert sum("not measured" in line for line in lines) == 1


def test_a_measurement_of_other_kernels_is_shown_as_such(tmp_path):
    made = results()
    made.settings[measured.DIGEST] = "0" * 64
    made.save(tmp_path)
    for line in measured.lines(GPU, tmp_path)[1:]:
        assert "not measured" in line and "with others: Triton 1." in line


def test_without_files_nothing_was_measured():
    lines = measured.lines(GPU)
    assert all("not measured" in line and "others" not in line for line in lines[1:])


@pytest.mark.parametrize(
    ("machine", "counts"),
    [
        (dict(name="Another GPU", capability="9.0"), True),  # the same architecture
        (dict(name="Another GPU", capability="8.0"), False),
        (dict(name="Another GPU", capability=None), False),
        (dict(capability=None), True),  # a file of before, of the same GPU
    ],
)
def test_an_architecture_is_a_compute_capability(tmp_path, machine, counts):
    results(**machine).save(tmp_path)
    assert bool(measured.of_architecture(GPU, [tmp_path])) is counts


def test_of_several_settings_the_slowest_counts(tmp_path):
    """auto has no better knowledge of the setting to come."""
    made = results()
    slow = []
    for row in made.rows:
        if row["road"] == variants.GRAPH:
            name = row["name"].replace("B=16", "B=1")
            speedup = row["speedup"] | dict(median=0.5 if row["label"].startswith("Triton") else 1.0)
            slow.append(row | dict(name=name, batch=1, speedup=speedup))
    made.rows += slow
    made.save(tmp_path)
    said = of_road(measured.lines(GPU, tmp_path), variants.GRAPH)
    assert "0.50x" in said and 'slower: model.kernels = "torch"' in said
    assert "slower" not in of_road(measured.lines(GPU, tmp_path), variants.LAUNCHED)


def test_files_of_before_are_read(invented, monkeypatch):
    """Those committed of the H200 had one base for all, and do not say which kernels they ran."""
    monkeypatch.undo()
    old = Results.load(next(measured.COMMITTED.glob("train-nvidia-h200.json")))
    assert measured.DIGEST not in old.settings
    found = {m.road: m for m in measured.measurements(old)}
    assert set(found) == {variants.LAUNCHED, variants.GRAPH}
    assert found[variants.LAUNCHED].ratio == pytest.approx(0.812, abs=1e-3)
    assert found[variants.GRAPH].ratio == pytest.approx(47.0009 / 30.9249, abs=1e-3), "over PyTorch in a graph too"
    assert "slower: fastgpt2.graphed(model), or" in found[variants.LAUNCHED].text
    assert "6.3 GiB against 17.6" in found[variants.GRAPH].text and "2026-11-26" in found[variants.GRAPH].text


def test_what_is_no_result_file_is_passed_over(tmp_path):
    (tmp_path / "train-broken.json").write_text("{}")
    results().save(tmp_path)
    assert measured.of_architecture(GPU, [tmp_path])


def test_the_overview_says_it(monkeypatch, capsys):
    for module in bench.COMMANDS:
        monkeypatch.setattr(module, "main", lambda options: 0)
    monkeypatch.setattr(bench, "find_device", lambda name: GPU)
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    assert 'kernels="auto" is Triton on Invented GPU' in out and "run fastgpt2 bench train" in out


def test_auto_follows_the_committed_results(monkeypatch):
    """Who commits figures in which these kernels are slower writes it into `SLOWER`, and takes out what is old."""
    monkeypatch.undo()
    assert switches.SLOWER == measured.slower(measured.COMMITTED)


def test_what_was_slower_is_known_by_road(tmp_path):
    made = results()
    for row in made.rows:
        if row["road"] in (variants.LAUNCHED, variants.MAX_AUTOTUNE) and row["label"].startswith("Triton"):
            row["speedup"] = row["speedup"] and row["speedup"] | dict(median=0.9)
    made.save(tmp_path)
    assert measured.slower(tmp_path) == {(9, 0): ("compile", "launched")}
    made.settings[measured.DIGEST] = "0" * 64
    made.save(tmp_path)
    assert measured.slower(tmp_path) == {}


@pytest.mark.parametrize("road", ["launched", "graph", "compile"])
def test_auto_is_pytorch_where_triton_was_slower(monkeypatch, road):
    def kernels() -> dict[str, ops.Kernels]:
        found = {"launched": ops.kernels_for("auto", GPU)}
        with ops.launched_by_graph():
            found["graph"] = ops.kernels_for("auto", GPU)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            found["compile"] = ops.kernels_for("auto", GPU)
        return found

    assert set(kernels().values()) == {ops.ALL_TRITON}
    monkeypatch.setattr(switches, "SLOWER", {(8, 0): ("launched", "graph", "compile"), (9, 0): (road,)})
    assert [way for way, found in kernels().items() if found == ops.ALL_TORCH] == [road]
    assert ops.kernels_for(ops.ALL_TRITON, GPU) == ops.ALL_TRITON, "what a user asks for by name stays"
    assert "but PyTorch where a step is" in measured.lines(GPU)[0]
