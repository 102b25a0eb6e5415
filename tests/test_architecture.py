"""The layers hold: imports point one way, heavy packages load late, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt2

ROOT = Path(__file__).parents[1]
LATE = {"transformers", "tiktoken", "matplotlib", "datasets"}
SOURCES = sorted(p for folder in ("kernels", "gpt2", "bench") for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of all that a file imports; relative ones as fastgpt2.<folder>.<name>."""
    tree = ast.parse(path.read_text())
    found = set()
    stack = list(ast.iter_child_nodes(tree))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = f"fastgpt2.{path.parent.name}." * bool(node.level) + (node.module or "")
            found |= {f"{prefix.rstrip('.')}.{alias.name}" for alias in node.names}
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (top_level_only and (late or typing_only)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def layer(name: str) -> str | None:
    """kernels, gpt2, bench or tests for a module of ours, None for others."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fastgpt2" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_one_way(path):
    names = imports(path)
    roots = {name.split(".")[0] for name in names}
    layers = {layer(name) for name in names} - {None}
    if path.parent.name == "kernels":
        foreign = roots - set(sys.stdlib_module_names) - {"torch", "triton", "fastgpt2"}
        assert layers <= {"kernels"} and not foreign - {"numpy"}, "kernels/ needs torch and triton only"
        if "numpy" in foreign:
            assert path.name == "_device.py", "only the interpreter's probe needs numpy"
        absolute = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not any((n.module or "").startswith("fastgpt2") for n in absolute), "kernels/ can be copied as a folder"
    elif path.parent.name == "gpt2":
        allowed = {"gpt2"} | ({"kernels"} if path.name == "ops.py" else set())
        assert layers <= allowed, f"{layers - allowed} imported: only ops.py opens the door to kernels/"
    else:
        assert layers <= {"gpt2", "kernels", "bench"}
    late = {name.split(".")[0] for name in imports(path, top_level_only=True)} & LATE
    assert not late, f"{late} must be imported inside the functions that need them"


def test_layer_checks_can_fail(tmp_path):
    bad = tmp_path / "gpt2" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import transformers\ndef f():\n    from fastgpt2.kernels import gelu\n")
    assert imports(bad) == {"transformers", "fastgpt2.kernels.gelu"}
    assert imports(bad, top_level_only=True) == {"transformers"}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_kernels_and_bench_are_namespaces():
    """With an `__init__.py`, kernels/ would shadow HuggingFace's `kernels` wherever the checkout is on sys.path."""
    assert not list((ROOT / "kernels").glob("__init__.py")) and not list((ROOT / "bench").glob("__init__.py"))
    code = "import kernels, transformers; print(kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.strip()).is_relative_to(ROOT)


def test_importing_the_package_is_light():
    code = f"import sys; from fastgpt2 import GPT; print([m for m in {sorted(LATE)} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_root_and_the_command_line_load_without_pytorch():
    """Ctrl-C in the seconds that PyTorch takes is then the command's to answer."""
    code = "import sys, fastgpt2, fastgpt2.gpt2.cli; print('torch' in sys.modules, 'GPT' in dir(fastgpt2))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False True", run.stdout + run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'GTP'"):
        fastgpt2.GTP  # noqa: B018
