"""`python -m fastgpt2.bench.hub FOLDER`: the kernels as a repository of HuggingFace's kernel hub, ready to upload.

    FOLDER/build/torch-cuda/      __init__.py, layers.py, the files of kernels/, metadata.json; also torch-rocm
    FOLDER/benchmarks/            for `kernels benchmark`

The package `kernels` reads it: `get_local_kernel(FOLDER)`, `LocalLayerRepository(FOLDER, layer_name="GELU")`, and after
the upload `get_kernel`. Nothing is compiled ahead, so a build is a copy, one a backend. Its operators get a namespace
with the sources' digest in it, so that they live beside those of an installed fastgpt2 and of other versions.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgpt2.gpt2.cli.cli import in_a_process
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.options import CommandOptions, Folder, Positional

NAME = "fastgpt2"
VERSION = 1  # of what `__init__.py` offers: raise it where a call of before no longer works
Backend = Literal["cuda", "rocm", "cpu"]
FUNCTIONS = {
    "attention": ("causal_attention",),
    "embedding": ("token_position_embedding",),
    "gelu": ("bias_gelu", "gelu"),
    "layer_norm": ("add_layer_norm", "layer_norm"),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "mlp": ("mlp",),
}
PACKAGE = Path(__file__).parents[2]
HERE = Path(__file__).parent


def build(folder: Path, backends: tuple[Backend, ...] = ("cuda", "rocm")) -> list[Path]:
    """Writes the kernels as a repository of HuggingFace's kernel hub; returns the folders of its builds.

    Raises ValueError for a folder that is not empty.

    Args:
        folder: new, or empty.
        backends: a build for each; the CPU's is for Triton's interpreter.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder")
    files = _sources()
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sorted(files.items())).encode()).hexdigest()
    identity = f"{NAME}_{digest[:12]}"
    files = {name: _renamed(text, identity) for name, text in files.items()}
    builds = [folder / "build" / f"torch-{backend}" for backend in backends]
    for backend, path in zip(backends, builds, strict=True):
        metadata = {
            "id": f"{identity}_{backend}",
            "name": NAME,
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        for name, text in {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            write_atomically(path / name, text)
    write_atomically(folder / "benchmarks" / "benchmark.py", (HERE / "benchmark.py").read_text(encoding="utf-8"))
    return builds


def _sources() -> dict[str, str]:
    """The files of one build, by name: imports are relative, since a build is imported under a name of its own."""
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "kernels").glob("*.py"))}
    layers = (HERE / "layers.py").read_text(encoding="utf-8")
    files["layers.py"] = layers.replace("from fastgpt2.kernels.", "from .")
    lines = [f"from .{module} import {', '.join(names)}" for module, names in FUNCTIONS.items()]
    names = sorted(["layers", *(name for names in FUNCTIONS.values() for name in names)])
    exported = [f'    "{name}",' for name in names]
    words = '"""GPT-2\'s kernels in Triton."""'
    files["__init__.py"] = "\n".join([words, "", "from . import layers", *lines, "", "__all__ = [", *exported, "]", ""])
    return files


def _renamed(text: str, namespace: str) -> str:
    """The operators' namespace, wherever it stands; words about fastgpt2 stay."""
    return re.sub(r"\bfastgpt2(?=::)|(?<=torch\.ops\.)fastgpt2\b|(?<=Library\(\")fastgpt2\b", namespace, text)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Writes the kernels as a repository of HuggingFace's kernel hub."""

    folder: Positional[Folder]  # new, or empty
    backends: tuple[Backend, ...] = ("cuda", "rocm")  # a build for each; the CPU's is for Triton's interpreter


def main(argv: Sequence[str]) -> int:
    """Prints the folders of the builds; returns 0."""
    options = parse(Options, argv, "python -m fastgpt2.bench.hub")
    print("\n".join(map(str, build(Path(options.folder), options.backends))))
    return 0


if __name__ == "__main__":
    sys.exit(in_a_process(main))
