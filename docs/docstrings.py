"""Lets mkdocstrings show what docstrings say of arguments as lists: one item a line that begins with `name: `."""

import re

import griffe

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
