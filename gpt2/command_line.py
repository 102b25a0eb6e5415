"""The options of a command from what is typed: parse(Options, argv, "fastgpt2 eval").

This is the only module that calls tyro, which decides which words belong to which option and writes the help. The words
get their meaning in options.py. A mistake is a ValueError of one line that names the option.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastgpt2.gpt2.options import (
    Form,
    NoPair,
    Positional,
    Repeated,
    as_words,
    form_of,
    hints,
    is_flag,
    markers,
    read_file,
    value_of,
)

T = TypeVar("T")


class CommandLine(Generic[T]):
    """What was typed after the name of a command.

    values: the options that were typed, each of its type; --help is not among them.
    """

    def __init__(self, options: type[T], argv: Sequence[str], prog: str, epilog: str = ""):
        """Raises ValueError, one line, for an option that does not exist or has a value that its type does not allow.

        epilog: what --help says at its end.
        """
        self._options, self._prog, self._epilog = options, prog, epilog
        found, left = _words(options, argv, prog)
        if written := _written_out(options, argv, left):
            found, left = _words(options, written, prog)
        self._help = "--help" in left or "-h" in left
        self.values: dict[str, Any] = {}
        if left and not self._help:
            raise ValueError(_unknown(options, left[0], prog))
        for name, words in found.items():
            try:
                self.values[name] = words if isinstance(words, bool) else value_of(hints(options)[name], words)
            except ValueError as error:
                if not self._help:
                    raise ValueError(f"{_shown(options, name)} is {' '.join(words)!r}, {error}") from None

    def over(self, defaults: Mapping[str, Any]) -> T:
        """`defaults`, and what was typed over them; what neither has is as the dataclass has it.

        Where --help was typed: prints it, with these defaults, and leaves with SystemExit(0).
        Raises ValueError where something required is in neither.
        """
        required = [name for name in _required(self._options) if name not in defaults]
        if self._help:
            usual = self._options(**{**dict.fromkeys(required, tyro.MISSING), **defaults})
            print(_help(self._options, self._prog, usual) + self._epilog)
            raise SystemExit(0)
        for name in required:
            if name not in self.values:
                metavar, shown = form_of(hints(self._options)[name]).metavar, _shown(self._options, name)
                what = shown if shown == metavar else f"{shown} {metavar}"
                raise ValueError(f"{self._prog} needs {what}: {self._prog} --help says more")
        return self._options(**{**defaults, **self.values})


def parse(options: type[T], argv: Sequence[str], prog: str) -> T:
    """The options of a command: what was typed, over what the file of --config says, over the defaults.

    Raises ValueError, one line that names the option, its value and what is allowed; FileNotFoundError for a file that
    does not exist; SystemExit(0) after --help.
    """
    line = CommandLine(options, argv, prog)
    file = line.values.get("config")
    return line.over(read_file(file, options) if file else {})


def choose(options: type[T], commands: Mapping[str, str], argv: Sequence[str], prog: str) -> tuple[T, list[str]]:
    """(`options`, whose `command` is one of `commands`, or what it is by default; the words behind its name).

    commands: {name: what it does}. What stands behind the name is the command's own, its --help too.
    Raises ValueError for a name that there is not, and as `parse`.
    """
    end = next((i for i, word in enumerate(argv, 1) if not word.startswith("-")), len(argv))
    width = max(map(len, commands))
    listed = (textwrap.fill(f"  {name:<{width}}  {what}", _width(), subsequent_indent=" " * (width + 4))
              for name, what in commands.items())  # fmt: skip
    chosen = CommandLine(options, argv[:end], prog, "\n\ncommands:\n" + "\n".join(listed)).over({})
    name = vars(chosen)["command"]
    if name is not None and name not in commands:
        raise ValueError(
            f"{prog} has no command {name!r}, the nearest is {_nearest(name, list(commands))}; "
            f"there are {', '.join(commands)}"
        )
    return chosen, list(argv[end:])


def _words(options: type, argv: Sequence[str], prog: str) -> tuple[dict[str, Any], list[str]]:
    """({option: its words, or True for --x and False for --no-x}, words that belong to none)."""
    annotated: Any = Annotated
    fields: list[tuple[str, Any, Any]] = []
    for name, hint in hints(options).items():
        kind: tuple[Any, ...] = (tuple[str, ...] | None, _spec(form_of(hint)))
        default: Any = None
        if is_flag(hint):
            kind = (bool | None, tyro.conf.DisallowNone)
        elif Repeated in markers(hint):
            kind, default = (tuple[str, ...],), ()
        parts = (*kind, *markers(hint))
        fields.append((name, annotated[parts], default))
    typed = dataclasses.make_dataclass("Typed", fields, kw_only=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            words: Any = tyro.cli(typed, args=list(argv), prog=prog, add_help=False, return_unknown_args=True)
    except SystemExit:
        raise ValueError(_in_words(said.getvalue(), options, prog)) from None
    found, left = vars(words[0]), list(words[1])
    return {name: found[name] for name, _, default in fields if found[name] != default}, left


def _spec(form: Form) -> PrimitiveConstructorSpec:
    """For tyro: how many words an option takes and how it is shown. The words stay words."""
    return PrimitiveConstructorSpec(
        nargs="*" if form.words == "?" else form.words,
        metavar=form.metavar,
        instance_from_str=tuple,
        is_instance=lambda value: True,
        str_from_instance=as_words,
    )


def _required(options: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(options) if f.default is missing and f.default_factory is missing]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(options: type, name: str) -> str:
    """An option as it is typed; what stands behind no option as the help calls it."""
    hint = hints(options)[name]
    return form_of(hint).metavar if Positional in markers(hint) else _flag(name)


def _flags(options: type) -> list[str]:
    """All that begins with -- and can be typed."""
    flags = {_flag(name): hint for name, hint in hints(options).items() if Positional not in markers(hint)}
    pairs = [f"--no-{flag[2:]}" for flag, hint in flags.items() if is_flag(hint) and NoPair not in markers(hint)]
    return [*flags, *pairs, "--help"]


def _written_out(options: type, argv: Sequence[str], left: Sequence[str]) -> list[str] | None:
    """`argv` with --temperature for --temp, where that is the beginning of one option alone; None without any such."""
    whole = {}
    for word in left:
        begun = word.partition("=")[0]
        fitting = [flag for flag in _flags(options) if begun[2:] and flag.startswith(begun.replace("_", "-"))]
        if len(fitting) == 1:
            whole[word] = fitting[0] + word[len(begun) :]
    return [whole.get(word, word) for word in argv] if whole else None


# ----------------------------------------------------------------------------------------------------- help and errors


def _unknown(options: type, word: str, prog: str) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{prog} has no use for {word!r}: a value stands behind its option, and {prog} --help names them all"
    return f"{prog} has no option {name}, the nearest is {_nearest(name, _flags(options))}"


def _nearest(word: str, names: Sequence[str]) -> str:
    return difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]


def _in_words(box: str, options: type, prog: str) -> str:
    """What tyro says in a box, in a line."""
    if lacking := re.search(r"Missing value for argument \W*--([\w-]+)", box):
        flag, name = f"--{lacking[1]}", lacking[1].replace("-", "_")
        metavar = form_of(hints(options)[name]).metavar
        return f"{flag} needs {metavar} behind it; a value that begins with - is typed {flag}=VALUE"
    return f"{prog}: {' '.join(_plain(box).split())}"


def _plain(text: str) -> str:
    """tyro's text without its boxes and rules; titles end in a colon."""
    text = re.sub(r"(?m) +$", "", text)
    text = re.sub(r"(?m)^ ?(\S.*)\n ?[-─]{5,}$", r"\1:", text)
    text = re.sub(r"(?m)^[╭+][─-]+ (.*?) [─-]*[╮+]$", r"\1:", text)
    text = re.sub(r"(?m)^[╰+][─-]+[╯+]$", "", text)
    return re.sub(r"(?m)^[│|] (.*?) *[│|]$", r"  \1", text)


def _wrapped(line: str) -> str:
    if len(line) <= _width():
        return line
    return textwrap.fill(line, _width(), subsequent_indent="       " if line.startswith("usage: ") else "")


def _width() -> int:
    return min(80, shutil.get_terminal_size().columns)


def _help(options: type, prog: str, default: Any) -> str:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def shown(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if Repeated in info.markers and info.type_origin is tuple:
            return None
        try:
            form = form_of(info.type)
        except (KeyError, TypeError, ValueError):  # tyro asks for parts of types too, and for the dataclass itself
            return None
        return None if form.hint is bool else _spec(form)

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        description = " ".join((inspect.getdoc(options) or "").split())
        tyro.cli(options, args=["--help"], prog=prog, description=description, default=default, registry=registry)
    # tyro does not call words that stand behind no option required.
    lines = _plain(text.getvalue()).replace("(default: )", "(required)").rstrip().splitlines()
    return "\n".join(map(_wrapped, lines))
