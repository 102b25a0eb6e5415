"""Former import paths, kept for one release: each still works, with a DeprecationWarning that names the new path."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HERE = "fastgpt2.gpt2"
MODULES = {
    "checkpoints": "weights.checkpoints",
    "corpus": "data.corpus",
    "decoder": "generation.decoder",
    "evaluate": "evaluation.evaluate",
    "generate": "generation.generate",
    "graphed": "training.graphed",
    "hellaswag": "evaluation.hellaswag",
    "huggingface": "weights.huggingface",
    "optim": "training.optim",
    "prepare": "data.prepare",
    "pretrained": "weights.pretrained",
    "recipe": "training.train_config",
    "sample": "generation.sample",
    "sampling": "generation.sampling",
    "shards": "data.shards",
    "sources": "data.sources",
    "tokenizer": "data.tokenizer",
    "train": "training.train",
    "trainer": "training.trainer",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module under its former name, if no other finder knows it, as the same object as under its new name."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == HERE and name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"{HERE}.{MODULES[old.rpartition('.')[2]]}"
        _warn(old, new)
        sys.modules[old] = importlib.import_module(new)  # the import statement returns this entry


def moved_names(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package that has the name of a former module. names: object name -> its module now."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{package}.{names[name]}.{name}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    return get


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old path goes with the next release", DeprecationWarning, stacklevel=3)
