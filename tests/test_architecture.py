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


# What each folder may import besides itself and what lies directly in its package: all arrows point down this list.
GPT2_FOLDERS = {
    "cli": {"training", "evaluation", "generation", "weights", "data"},
    "training": {"evaluation", "generation", "weights", "data"},
    "generation": {"evaluation", "weights", "data"},
    "evaluation": {"data"},
    "weights": {"data"},
    "data": set(),
    "hf": set(),
}
BENCH_FOLDERS = {
    "timing": {"audit", "report", "verify", "cases"},
    "audit": {"report", "cases"},
    "report": {"cases"},
    "verify": {"report", "cases"},
    "hub": set(),
    "cases": set(),
}
# nanoGPT's and HuggingFace's interfaces are methods of the model, which import what they call when they are called.
METHODS = {
    "fastgpt2.gpt2.generation.generate",
    "fastgpt2.gpt2.training.optim",
    "fastgpt2.gpt2.weights.huggingface",
    "fastgpt2.gpt2.weights.pretrained",
}


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("fastgpt2", *parts)).removesuffix(".__init__")


def imports(path: Path, functions: bool = True, types: bool = True, root: Path = ROOT) -> set[str]:
    """Absolute names of all that a file imports. functions: also inside functions; types: also for type checkers."""
    package = module_name(path.parent / "__init__.py", root)
    tree = ast.parse(path.read_text())
    found = set()
    stack = list(ast.iter_child_nodes(tree))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            prefix = ".".join(filter(None, (base, node.module)))
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if (functions or not late) and (types or not typing_only):
            stack.extend(ast.iter_child_nodes(node))
    return found


def layer(name: str) -> str | None:
    """kernels, gpt2, bench or tests for a module of ours, None for others."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fastgpt2" and len(parts) > 1 else None


def broken_rules(path: Path, root: Path = ROOT) -> list[str]:
    """What a file imports and must not. The layer is the first folder under the root, however deep the file lies."""
    names = imports(path, root=root)
    roots = {name.split(".")[0] for name in names}
    layers = {layer(name) for name in names} - {None}
    home = path.relative_to(root).parts[0]
    broken = []
    if home == "kernels":
        foreign = roots - set(sys.stdlib_module_names) - {"torch", "triton", "fastgpt2"}
        if path.name == "_device.py":
            foreign -= {"numpy"}  # for the interpreter's probe
        absolute = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        if layers - {"kernels"} or foreign:
            broken.append(f"kernels/ needs torch and triton only, not {sorted(layers - {'kernels'} | foreign)}")
        if any((n.module or "").startswith("fastgpt2") for n in absolute):
            broken.append("kernels/ can be copied as a folder: its imports are relative")
    elif home == "gpt2":
        allowed = {"gpt2"} | ({"kernels"} if path == root / "gpt2" / "ops.py" else set())
        if layers - allowed:
            broken.append(f"{sorted(layers - allowed)} imported: only gpt2/ops.py opens the door to kernels/")
    elif layers - {"gpt2", "kernels", "bench"}:
        broken.append(f"bench/ imports {sorted(layers)}")
    if "argparse" in roots or (
        "tyro" in roots and path not in (root / "gpt2" / "options.py", root / "gpt2" / "command_line.py")
    ):
        broken.append("options are dataclasses that gpt2/command_line.py reads, with tyro")
    if late := {name.split(".")[0] for name in imports(path, False, False, root)} & LATE:
        broken.append(f"{late} must be imported inside the functions that need them")
    return broken


def arrows(files: list[Path], root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> modules among `files` that it imports, inside functions and for types too."""
    modules = {module_name(path, root): path for path in files}
    found = {}
    for name, path in modules.items():
        targets = set()
        for imported in imports(path, root=root):
            while imported and imported not in modules:  # a name inside a module
                imported = imported.rpartition(".")[0]
            targets.add(imported)
        if path == root / "gpt2" / "model.py":
            targets -= {
                name for name in METHODS if not any(i.startswith(name) for i in imports(path, False, root=root))
            }
        found[name] = targets - {name, ""}
    return found


def folder_arrows(files: list[Path], package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Folder of a package -> other folders of it that its modules import; "" is what lies directly in the package."""
    folders = {module_name(path, root): (path.relative_to(root / package).parts[:-1] or ("",))[0] for path in files}
    found: dict[str, set[str]] = {folder: set() for folder in folders.values()}
    for name, targets in arrows(files, root).items():
        found[folders[name]] |= {folders[target] for target in targets} - {folders[name]}
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The members of cycles and what leads only to them; [] where there is none."""
    left = {name: set(targets) for name, targets in graph.items()}
    while ends := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in ends}
    return sorted(left)


def code(package: str) -> list[Path]:
    return [path for path in SOURCES if path.is_relative_to(ROOT / package)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert not broken_rules(path)


@pytest.mark.parametrize(("package", "allowed"), [("gpt2", GPT2_FOLDERS), ("bench", BENCH_FOLDERS)])
def test_folders_import_in_one_direction(package, allowed):
    assert not cycle(allowed)
    found = folder_arrows(code(package), package)
    at_the_root = found.pop("")
    assert found.keys() == allowed.keys(), "a folder is in no list here"
    for folder, targets in found.items():
        assert targets - {""} <= allowed[folder], f"{package}/{folder}/ imports {targets - {''} - allowed[folder]}"
    if package == "gpt2":  # what the model is knows none of the folders; the command and bench's are above them
        assert at_the_root <= {"cli"}
        assert arrows(code("gpt2"))["fastgpt2.gpt2.__main__"] == {"fastgpt2.gpt2.cli.cli"}
    else:
        assert "" not in set().union(*found.values()), "bench/__main__.py is imported"


def test_no_module_imports_what_imports_it():
    assert not cycle(arrows(SOURCES))


def write(root: Path, files: dict[str, str]) -> list[Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return [root / name for name in files]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gpt2/sub/x.py", "from fastgpt2.kernels import gelu", "ops.py"),
        ("gpt2/sub/x.py", "from ...kernels.gelu import gelu", "ops.py"),
        ("gpt2/sub/x.py", "from fastgpt2.bench import timing", "ops.py"),
        ("gpt2/sub/ops.py", "from fastgpt2.kernels import gelu", "ops.py"),
        ("gpt2/x.py", "def f():\n    from fastgpt2.kernels import gelu", "ops.py"),
        ("kernels/x.py", "from ..gpt2 import model", "torch and triton only"),
        ("kernels/x.py", "import numpy", "torch and triton only"),
        ("kernels/x.py", "from fastgpt2.kernels import gelu", "relative"),
        ("bench/sub/x.py", "from fastgpt2.tests import numerics", "tests"),
        ("bench/sub/x.py", "import transformers", "inside the functions"),
        ("bench/sub/x.py", "def f():\n    import argparse", "options are dataclasses"),
        ("gpt2/cli/x.py", "from tyro import cli", "options are dataclasses"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, name, text, said):
    (path,) = write(tmp_path, {name: text})
    assert any(said in line for line in broken_rules(path, tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt2/ops.py", "from fastgpt2.kernels import gelu"),
        ("gpt2/sub/x.py", "from ..model import GPT\nfrom . import y"),
        ("gpt2/sub/x.py", "def f():\n    import transformers"),
        ("kernels/x.py", "from . import gelu\nimport torch, math"),
    ],
)
def test_a_right_import_is_let_through(tmp_path, name, text):
    (path,) = write(tmp_path, {name: text})
    assert not broken_rules(path, tmp_path)


TYPE_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize("back", ["", TYPE_ONLY, "def f():\n    "], ids=["plain", "type-only", "in a function"])
def test_cycles_are_seen(tmp_path, back):
    files = write(
        tmp_path, {"gpt2/a/x.py": "from fastgpt2.gpt2.b import y", "gpt2/b/y.py": f"{back}from ..a.x import thing"}
    )
    assert cycle(arrows(files, tmp_path)) == ["fastgpt2.gpt2.a.x", "fastgpt2.gpt2.b.y"]
    assert folder_arrows(files, "gpt2", tmp_path) == {"a": {"b"}, "b": {"a"}}


@pytest.mark.parametrize(("back", "seen"), [("def f():\n    ", False), ("", True), (TYPE_ONLY, True)])
def test_only_the_models_methods_may_import_what_is_above_them(tmp_path, back, seen):
    files = write(
        tmp_path,
        {
            "gpt2/model.py": f"{back}from fastgpt2.gpt2.training.optim import adamw",
            "gpt2/training/optim.py": "from fastgpt2.gpt2.model import GPT",
        },
    )
    assert bool(cycle(arrows(files, tmp_path))) == seen


# Above 400 lines, look whether a file holds two subjects. Files that were looked at stand here with the reason.
LONG: dict[str, str] = {}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.name)
def test_long_files_have_a_reason(path):
    assert (len(path.read_text().splitlines()) > 400) == (str(path.relative_to(ROOT)) in LONG)


def test_kernels_and_bench_are_namespaces():
    """With an `__init__.py`, kernels/ would shadow HuggingFace's `kernels` wherever the checkout is on sys.path."""
    assert not list((ROOT / "kernels").rglob("__init__.py")) and not list((ROOT / "bench").rglob("__init__.py"))
    code = "import kernels, transformers; print(kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.strip()).is_relative_to(ROOT)


def test_importing_the_package_is_light():
    late = sorted(LATE | {"torch._dynamo"})  # Dynamo takes as long as the rest of PyTorch
    code = f"import sys; from fastgpt2 import GPT; print([m for m in {late} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_root_and_the_command_line_load_without_pytorch():
    """Ctrl-C in the seconds that PyTorch takes is then the command's to answer."""
    code = "import sys, fastgpt2, fastgpt2.gpt2.cli.cli; print('torch' in sys.modules, 'GPT' in dir(fastgpt2))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False True", run.stdout + run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'GTP'"):
        fastgpt2.GTP  # noqa: B018
