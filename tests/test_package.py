"""The wheel: what is in it, and that it lives beside HuggingFace's `kernels` and transformers."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "checkout"  # a copy: building leaves files behind
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")
    shutil.copytree(ROOT, source, ignore=hidden)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (path,) = out.glob("fastgpt2-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastgpt2"}
    for wanted in ("__init__.py", "py.typed", "kernels/layer_norm.py", "gpt2/data/windows.py", "bench/__main__.py"):
        assert f"fastgpt2/{wanted}" in names
    for unwanted in ("setup.py", "tests/", "kernels/__init__.py", "bench/__init__.py", "bench/results/"):
        assert not any(name.startswith(f"fastgpt2/{unwanted}") for name in names)
    for source in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("gpt2/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        assert f"fastgpt2/{source.relative_to(ROOT).as_posix()}" in names


def test_wheel_lives_beside_huggingface_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    code = """
import kernels, transformers, fastgpt2, fastgpt2.kernels.gelu, fastgpt2.bench.cases.registry
from fastgpt2 import GPT
from transformers import GPT2LMHeadModel
from kernels import get_kernel
print(fastgpt2.__file__, fastgpt2.kernels.gelu.__file__, kernels.__file__, sep="\\n")
"""
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    ours, gelu, theirs = map(Path, out.split())
    assert ours.is_relative_to(site) and gelu.is_relative_to(site) and not theirs.is_relative_to(site)


def test_console_script_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "fastgpt2 = fastgpt2.gpt2.cli:main" in archive.read(entry).decode()
