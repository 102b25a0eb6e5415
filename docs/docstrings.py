"""Lets mkdocstrings find the package, and show what docstrings say of arguments as lists: an item for each `name: `."""

import re
from pathlib import Path

import griffe

# The checkout's root is the package. kernels/ has no __init__.py, so that it cannot hide PyPI's package of that name;
# mkdocstrings does not look into such a folder of a package, so that it gets a name of its own.
LINKS = {"fastgpt2": "..", "fastgpt2_kernels": "../kernels"}

ARGUMENT = re.compile(r"(\w+(?:, \w+)*): (?=\S)")
RESULT = re.compile(r"(Returns|Raises|Yields)\b")


def as_list(docstring: str) -> str:
    """The same text, with `- ` before lines about an argument, and a new paragraph for results and for errors."""
    lines, indented = [], False
    for line in docstring.splitlines():
        argument = ARGUMENT.match(line)
        if argument:
            names = ", ".join(f"`{name}`" for name in argument[1].split(", "))
            lines += ["", f"- {names}: {line[argument.end() :]}"]
            indented = True
        elif RESULT.match(line):
            lines += ["", line]
            indented = False
        else:
            indented = indented and bool(line.strip())
            lines.append(f"  {line.strip()}" if indented else line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = as_list(obj.docstring.value)


def on_startup(**kwargs) -> None:
    """Called by MkDocs (`hooks` in mkdocs.yml): links the packages where mkdocs.yml's `paths` has them looked for."""
    folder = Path(__file__).parent.parent / ".types"
    folder.mkdir(exist_ok=True)
    for name, target in LINKS.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
