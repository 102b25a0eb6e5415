"""README and docs/: every snippet and command runs as it stands there, and figures are those of the result files."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_worker import ELSEWHERE, PAGES, ROOT, blocks, commands, is_elsewhere
from hf_models import hf_gpt2, write_folder

from fastgpt2.bench.report import documentation

WORKER = Path(__file__).with_name("documentation_worker.py")


def write_hub(folder: Path) -> None:
    """HuggingFace's cache as it is after gpt2 was downloaded, but with a small model of GPT-2's vocabulary."""
    gpt2, revision = folder / "hub" / "models--gpt2", "0" * 40
    (gpt2 / "refs").mkdir(parents=True)
    (gpt2 / "refs" / "main").write_text(revision)
    write_folder(gpt2 / "snapshots" / revision, hf_gpt2(n_layer=1, vocab_size=50257, n_positions=1024))


def test_every_snippet_and_command_runs(tmp_path):
    write_hub(tmp_path / "cache")
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    command = [sys.executable, str(WORKER), str(tmp_path / "work")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_the_worker_sees_the_pages():
    """A block in another language, or a fence that is not closed, would be passed over without a word."""
    languages = {page.name: [language for language, _ in blocks(page)] for page in PAGES}
    assert set().union(*languages.values()) <= {"python", "sh", "mermaid"}
    assert languages["README.md"].count("python") >= 3 and languages["generation.md"] == ["sh", "python", "python"]
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(languages[page.name]), page
    every = [
        command for page in PAGES for language, code in blocks(page) if language == "sh" for command in commands(code)
    ]
    assert sum(not is_elsewhere(command) for command in every) >= 12
    assert {beginning for beginning in ELSEWHERE if any(c.startswith(beginning) for c in every)} == set(ELSEWHERE)


def test_figures_are_those_of_the_result_files():
    assert documentation.stale() == [], "run python -m fastgpt2.bench.report.documentation"
    text = "".join(page.read_text("utf-8") for page in documentation.pages())
    assert set(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == set(documentation.TABLES)


def test_a_changed_figure_is_noticed():
    page = (ROOT / "README.md").read_text("utf-8")
    assert documentation.filled(page.replace("| 6.3 GiB |", "| 5.3 GiB |")) == page
    with pytest.raises(ValueError, match="figures 'speed' are unknown, there are first-screen, "):
        documentation.filled("<!-- figures: speed -->\n<!-- end of figures -->")


def test_pictures_exist_and_are_shown():
    shown = set()
    for page in documentation.pages():
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), f"{page}: {target}"
            shown.add((page.parent / target).resolve())
    assert shown == {file.resolve() for file in documentation.PICTURES.glob("*.png")}
    assert {f"{name}.png" for name in documentation.FIGURES} <= {file.name for file in shown}


def test_links_in_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    for target, anchor in re.findall(r"\]\(([\w./-]+\.md)(?:#([\w-]+))?\)", text):
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text("utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in ("", *anchors), f"{target}#{anchor}"


def test_the_readme_is_one_screen_and_some():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_notebook_is_valid():
    notebook = json.loads((ROOT / "examples" / "free_gpu.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            ast.parse("\n".join("pass" if line.startswith(("!", "%")) else line for line in lines))
