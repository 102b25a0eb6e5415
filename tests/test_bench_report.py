"""Reports hold every row and picture that the results can show, and comparisons tell a regression from noise."""

import base64
import copy
import json
import re

import bench_results
import pytest

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.report import differences, plots, tables
from fastgpt2.bench.report.measured import COMMITTED
from fastgpt2.bench.report.record import Results
from fastgpt2.gpt2.ops import Kernels

EVERY = {
    "train": bench_results.train_results,
    "ops": bench_results.ops_results,
    "generate": bench_results.generate_results,
    "race": bench_results.race_results,
    "other": bench_results.other_results,
}
PICTURES = {
    "train": ["Tokens a second", "What each switch gives", "Memory against batch"],
    "ops": ["Roofline", "Time against sequence length"],
    "generate": ["Tokens a second"],
    "race": ["Loss against seconds"],
    "other": [],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(page, Markdown, folder) of results of every kind."""
    folder = tmp_path_factory.mktemp("report")
    files = [str(make().save(folder)) for make in EVERY.values()]
    assert bench.main(["report", *files, "--out", str(folder / "out")]) == 0
    out = folder / "out"
    return (out / "report.html").read_text(), (out / "report.md").read_text(), out


@pytest.mark.parametrize("kind", EVERY)
def test_every_row_is_in_the_report(report, kind):
    page, text, _ = report
    headers, rows = tables.table(EVERY[kind]())
    assert len(rows) == len(EVERY[kind]().rows)
    for row in rows:
        assert "| " + " | ".join(row) + " |" in text
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert all(header in page and header in text for header in headers)


def test_the_machine_and_what_was_left_out_are_there(report):
    page, text, _ = report
    for words in ("Invented GPU, 80 GiB, driver 1.2.3, power limit 400 W", "torch 9.9.9", "MFU: a formula"):
        assert words in page and words in text
    assert "left out: nanoGPT: no path &lt;given&gt;" in page and "out of memory" in page


def test_a_busy_machine_is_told(capsys, report):
    tables.show(bench_results.train_results())
    assert "busy (load 6.5)" in capsys.readouterr().out and "6.5 (an idle machine" in report[0]
    results = bench_results.train_results()
    results.machine = results.machine | dict(load=0.3)
    tables.show(results)
    assert "busy" not in capsys.readouterr().out


def test_the_page_needs_nothing_else(report):
    page, text, folder = report
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert len(sources) == sum(map(len, PICTURES.values()))
    for source in sources:
        kind, _, encoded = source.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(encoded).startswith(b"\x89PNG")
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", EVERY)
def test_pictures_are_of_what_is_there(kind):
    assert list(plots.plots(EVERY[kind]())) == PICTURES[kind]


def test_pictures_without_data_are_left_out():
    train, ops = bench_results.train_results(), bench_results.ops_results()
    train.rows = [row for row in train.rows if "Triton" not in row["label"] and not row["alone"]]
    ops.rows = [row for row in ops.rows if row["T"] == 256]
    assert list(plots.plots(train)) == ["Tokens a second"] and list(plots.plots(ops)) == ["Roofline"]
    train.rows, ops.rows = [], []
    assert not plots.plots(train) and not plots.plots(ops)


def test_a_baseline_that_wins_is_shown_winning():
    """The longest bar is the fastest row's, whoever's it is."""
    results = bench_results.train_results()
    row = next(row for row in results.rows if row["label"] == "PyTorch, SDPA + compile" and not row["alone"])
    row["tokens_per_s"] = dict(p20=9e5, median=1e6, p80=1.1e6)
    (axes,) = plots.throughput(results).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    widths = dict(zip(labels, (bar.get_width() for bar in axes.patches), strict=True))
    assert max(widths, key=widths.get) == "PyTorch, SDPA + compile" and widths[max(widths, key=widths.get)] == 1e6
    assert "HuggingFace, sdpa" not in widths, "it ran out of memory"


def panels(figure) -> dict[str, tuple[str, list[str], list[float], str]]:
    """Title -> (label of the x axis, labels of the bars, their lengths, what is written)."""
    found = {}
    for axes in figure.axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        written = " ".join(text.get_text() for text in axes.texts)
        found[axes.get_title().split("\n")[0]] = (
            axes.get_xlabel(), labels, [bar.get_width() for bar in axes.patches], written,
        )  # fmt: skip
    return found


def test_the_ladder_of_graphs_comes_first():
    results = bench_results.train_results()
    found = panels(plots.ladder(results))
    graph, launched, compiled = found.values()
    switches = [f"Triton: {name}" for name in Kernels.names()] + ["Triton", "Triton, mlp=fused"]
    assert "CUDA graph" in list(found)[0] and "Python" in list(found)[1] and list(found)[2] == "Compiled"
    assert graph[0].startswith("times as fast as PyTorch, SDPA + CUDA graph (") and graph[1] == switches
    assert launched[0].startswith("times as fast as PyTorch, SDPA (") and launched[1] == switches
    assert len(compiled[1]) == 6 and "compiled in the same mode" in compiled[0]
    expected = {row["label"]: row["speedup"]["median"] for row in results.rows if row["speedup"]}
    assert graph[2] == pytest.approx([expected[name + " + CUDA graph"] for name in switches])
    assert launched[2] == pytest.approx([expected[name] for name in switches])


def test_results_of_before_say_which_ladder_was_not_measured():
    """The committed ones of the H200: one base for all, and no switch alone in a graph."""
    old = Results.load(COMMITTED / "train-nvidia-h200.json")
    found = panels(plots.ladder(old))
    empty, launched = found.values()
    assert list(found)[1] == "All over PyTorch launched from Python", "the one in a graph too"
    assert empty[2] == [] and "not measured" in empty[3]
    assert launched[0].startswith("times as fast as PyTorch, SDPA (") and len(launched[1]) == 7
    assert launched[1][-1] == "Triton + CUDA graph" and launched[2][-1] == pytest.approx(1.6945, abs=1e-4)


def test_all_that_was_committed_can_be_reported(tmp_path):
    files = sorted(COMMITTED.glob("*-*-*.json"))
    assert len(files) >= 5
    assert bench.main(["report", *map(str, files), "--out", str(tmp_path)]) == 0
    assert "529,799" in (tmp_path / "report.md").read_text()


def test_a_peer_has_its_version():
    results = bench_results.ops_results()
    results.rows[3]["version"] = "9.8.7"
    headers, rows = tables.table(results)
    variant = headers.index("variant")
    assert rows[3][variant] == "flash-attn 9.8.7" and rows[2][variant] == "Triton"


def test_no_files_is_an_error_that_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`fastgpt2 bench train` writes one"):
        bench.main(["report"])


# -------------------------------------------------------------------------------------------------------- compare


def changed(factor: float, spread: float = 1.0) -> Results:
    """The made-up ops with one row's time changed, and every spread widened."""
    results = bench_results.ops_results()
    for row in results.rows:
        ms = row["time_ms"]
        ms |= dict(p20=ms["median"] * (1 - 0.03 * spread), p80=ms["median"] * (1 + 0.04 * spread))
    row = results.rows[0]
    row["time_ms"] = {k: v * factor if k != "runs" else v for k, v in row["time_ms"].items()}
    return results


@pytest.mark.parametrize(
    ("factor", "spread", "threshold", "status"),
    [
        (1.0, 1.0, "0.05", 0),
        (1.5, 1.0, "0.05", 1),
        (1.5, 1.0, "0.6", 0),  # below the threshold
        (1.08, 2.0, "0.05", 0),  # above it, within the noise
        (0.5, 1.0, "0.05", 0),  # faster
    ],
)
def test_the_status_says_whether_something_became_slower(tmp_path, capsys, factor, spread, threshold, status):
    a = changed(1.0, spread).save(tmp_path / "a")
    b = changed(factor, spread).save(tmp_path / "b")
    assert bench.main(["report", "--compare", str(a), str(b), "--threshold", threshold]) == status
    out = capsys.readouterr().out
    assert f"{status} of {len(changed(1.0).rows)} rows are slower" in out
    assert ("faster" in out) == (factor == 0.5)


def test_a_change_is_the_ratio_with_its_noise():
    changes, lost, missing = differences.list_changes(changed(1.0), changed(1.5))
    assert not missing and not lost and changes[0].ratio == pytest.approx(1.5) and changes[0].verdict == "slower"
    assert changes[0].low == pytest.approx(1.5 * 0.97 / 1.04) and changes[0].high == pytest.approx(1.5 * 1.04 / 0.97)
    assert {c.verdict for c in changes[1:]} == {"same"}


def test_what_cannot_be_compared_is_listed():
    a, b = changed(1.0), changed(1.0)
    gone, new = b.rows.pop(3)["name"], copy.deepcopy(b.rows[0])
    b.rows.append({**new, "name": "new"})
    a.rows[2]["time_ms"] = None
    _, lost, missing = differences.list_changes(a, b)
    assert missing == [f"{gone}: only in A", "new: only in B", f"{a.rows[2]['name']}: no time in A"] and not lost


def test_a_row_that_ran_before_and_ends_memory_now_is_a_regression(tmp_path, capsys):
    a, b = changed(1.0), changed(1.0)
    b.rows[1] |= dict(time_ms=None, what="out of memory")
    files = [str(r.save(tmp_path / name)) for name, r in (("a", a), ("b", b))]
    assert bench.main(["report", "--compare", *files]) == 1
    assert f"lost: {a.rows[1]['name']}: out of memory in B" in capsys.readouterr().out.replace("\n", "")


def test_two_files_of_one_machine_have_pictures_of_their_own(tmp_path):
    files = [str(bench_results.train_results().save(tmp_path / name)) for name in ("a", "b")]
    assert bench.main(["report", *files, "--out", str(tmp_path)]) == 0
    pictures = re.findall(r"!\[.*\]\((.*)\)", (tmp_path / "report.md").read_text())
    assert len(pictures) == len(set(pictures)) and all((tmp_path / name).is_file() for name in pictures)


def test_other_machines_and_versions_are_named(tmp_path, capsys):
    a, b = changed(1.0), changed(1.0)
    b.machine = json.loads(json.dumps(b.machine)) | dict(power_limit_w=300.0)
    b.machine["versions"]["torch"] = "10.0"
    bench.main(["report", "--compare", str(a.save(tmp_path / "a")), str(b.save(tmp_path / "b"))])
    out = capsys.readouterr().out
    assert "power_limit_w: 400.0 -> 300.0" in out and "torch: 9.9.9 -> 10.0" in out


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    ops, train = bench_results.ops_results(), bench_results.train_results()
    with pytest.raises(ValueError, match="kinds 'ops' and 'train'"):
        differences.list_changes(ops, train)
    other = bench_results.ops_results()
    other.rows = []
    with pytest.raises(ValueError, match="no timed row in common"):
        differences.list_changes(ops, other)
    with pytest.raises(ValueError, match="--threshold is -1"):
        differences.list_changes(ops, ops, -1)
    with pytest.raises(ValueError, match="leave the others out"):
        bench.main(["report", "x.json", "--compare", "a.json", "b.json"])


# --------------------------------------------------------------------------------------------------- what is readable


def test_small_numbers_keep_their_digits():
    shown = [tables.quantity(value) for value in (1.1, 0.6, 0.0123, 99.4, 250.4, 1234567.0)]
    assert shown == ["1.1", "0.6", "0.0123", "99.4", "250", "1,234,567"]
    results = bench_results.train_results()
    timed = [row for row in results.rows if row["time_ms"] and not row["alone"]]
    for row, value in zip(timed, (1.1, 0.6), strict=False):
        row["tokens_per_s"] = dict(p20=value, median=value, p80=value)
    written = [text.get_text() for axes in plots.throughput(results).axes for text in axes.texts]
    assert "1.1" in written and "0.6" in written
    results = bench_results.ops_results()
    results.rows[0] |= dict(time_ms=dict(p20=1e-4, median=2e-4, p80=3e-4), gb_per_s=0.004)
    headers, (first, *_) = tables.table(results)
    cells = dict(zip(headers, first, strict=True))
    assert (cells["ms"], cells["20..80%"], cells["GB/s"]) == ("0.0002", "0.0001..0.0003", "0.004")


@pytest.mark.parametrize("kind", EVERY)
def test_no_name_is_cut_on_a_narrow_terminal(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    results = EVERY[kind]()
    tables.show(results)
    lines = capsys.readouterr().out.splitlines()
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    for row in tables.table(results)[1]:
        assert any(all(cell in line for cell in row) for line in lines), row


def test_no_row_of_a_comparison_is_cut(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    file = bench_results.ops_results().save(tmp_path)
    assert bench.main(["report", "--compare", str(file), str(file)]) == 0
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in bench_results.ops_results().rows if row["time_ms"])


def test_what_is_faster_than_the_measured_memory_is_explained():
    results = bench_results.ops_results()
    for row in results.rows:
        if row["time_ms"] and row["fraction"] is not None:
            row["fraction"], row["time_ms"] = 0.5, dict(p20=1e3, median=1e3, p80=1e3)
    assert (
        not any("cache" in line for line in tables.notes(results)) and not plots.roofline(results).axes[0].get_title()
    )
    row = next(row for row in results.rows if row["time_ms"] and row["fraction"] is not None)
    row |= dict(fraction=1.7, time_ms=dict(p20=1e-9, median=1e-9, p80=1e-9))
    assert any("a cache, which is faster than the measured copy" in line for line in tables.notes(results))
    assert "a cache, which is faster" in plots.roofline(results).axes[0].get_title()


def test_every_column_of_the_page_is_seen_at_1200_pixels():
    """A column is at least as wide as its longest word, which the page's style lets stand alone in a line."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    from fastgpt2.bench.report.report import STYLE

    assert "nowrap" not in STYLE
    font = FontProperties(family="DejaVu Sans")  # wider than the fonts of common systems

    def width(word):
        return TextPath((0, 0), word, size=13, prop=font).get_extents().width if word else 0

    for name in ("train-nvidia-h200.json", "ops-amd-epyc.json", "generate-nvidia-h200.json"):
        headers, rows = tables.table(Results.load(COMMITTED / name))
        columns = [{word for cell in column for word in cell.split()} for column in zip(headers, *rows, strict=True)]
        words = [max(column, key=len, default="") for column in columns]
        assert sum(width(word) + 2 * 6 for word in words) < 1200 - 48, words
