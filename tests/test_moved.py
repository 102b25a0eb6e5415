"""Import paths of before the folders: they lead to the same modules, with a warning that names the new path."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt2.gpt2
from fastgpt2.gpt2._moved import MODULES

# A process of its own: a module is found by its old name once, and other tests may have been first.
OLD = """
import warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    {statement}
print([(w.category.__name__, str(w.message), w.filename) for w in said if "is now" in str(w.message)])
print({value})
"""


def old_import(statement: str, value: str) -> list[str]:
    code = OLD.format(statement=statement, value=value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("statement", "value", "old", "new"),
    [
        ("from fastgpt2.gpt2.train import TrainConfig as X", "X.__name__", "train", "training.train"),
        ("from fastgpt2.gpt2 import graphed as X", "X.__spec__.name", "graphed", "training.graphed"),
        ("import fastgpt2.gpt2.sample as X", "X.__name__", "sample", "generation.sample"),
        ("from fastgpt2.gpt2.data import Windows as X", "X.__name__", "data.Windows", "data.windows.Windows"),
    ],
)
def test_an_old_path_works_and_names_the_new_one(statement, value, old, new):
    said, found = old_import(statement, value)
    assert "DeprecationWarning" in said and "<string>" in said  # said of the line that imports
    assert f"fastgpt2.gpt2.{old} is now fastgpt2.gpt2.{new};" in said
    assert found in ("TrainConfig", "Windows", f"fastgpt2.gpt2.{new}")


def test_every_old_path_leads_to_a_module_that_is_there():
    folder = Path(fastgpt2.gpt2.__file__).parent
    for old, new in MODULES.items():
        assert (folder / f"{new.replace('.', '/')}.py").is_file(), new
        assert not (folder / old).exists() and not (folder / f"{old}.py").exists(), old


def test_the_old_module_is_the_new_one():
    """A test of a user that replaces something in the old module replaces it for the package too."""
    old = importlib.import_module("fastgpt2.gpt2.generate")
    assert old is importlib.import_module("fastgpt2.gpt2.generation.generate")


def test_what_never_was_is_still_missing():
    with pytest.raises(ModuleNotFoundError, match="fastgpt2.gpt2.nothing"):
        importlib.import_module("fastgpt2.gpt2.nothing")
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from fastgpt2.gpt2.data import Nothing")
