"""What a command takes, as one frozen dataclass whose fields are its options, on the command line and in a YAML file.

    @dataclass(frozen=True, kw_only=True)
    class Options(CommandOptions):
        "Evaluates a model."                # the description in --help
        checkpoint: Folder                  # required, since it has no default; a comment is the option's help
        tokens: int = 2**20                 # --tokens N
        check: bool = True                  # --check and --no-check
        kind: Literal["a", "b"] = "a"       # one of these
        source: tuple[str, ...] = ()        # --source A B C
        reference: Repeated[tuple[str, ...]] = ()  # --reference A --reference B
        runs: Positional[tuple[Folder, ...]]       # words that stand behind no option

command_line.py reads these from the command line, with tyro, whose words for types are used here. What the words of an
option mean is decided here by the type of its field, so that a value in a file and on the command line is the same
value, and a mistake in either is one line.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tyro.conf import FlagCreatePairsOff as NoPair
from tyro.conf import Positional as Positional
from tyro.conf import UseAppendAction as Repeated
from tyro.constructors import PrimitiveConstructorSpec


def as_words(value: Any) -> list[str]:
    """A default, for --help."""
    if isinstance(value, tuple):
        return [str(each) for each in value] or ["none"]
    return [str(value)]


class Form(NamedTuple):
    """How the value of an option is typed."""

    hint: Any  # the type of the value, or of one of several
    words: int | Literal["*", "?"]  # how many
    metavar: str
    optional: bool  # None is allowed
    verbatim: bool  # the word None is a text as any other
    bare: str | None  # what the option means where no word follows it


class Word(PrimitiveConstructorSpec):
    """`Annotated[str, Word("FILE")]` is shown as FILE."""

    def __init__(self, metavar: str, *, verbatim: bool = False, bare: str | None = None):
        """verbatim: the word None is a text as any other. bare: what the option means where no word follows it; without
        it a word has to follow."""
        super().__init__(
            nargs=1 if bare is None else "*",
            metavar=metavar if bare is None else f"[{metavar}]",
            instance_from_str=tuple,
            is_instance=lambda value: True,
            str_from_instance=as_words,
        )
        object.__setattr__(self, "verbatim", verbatim)
        object.__setattr__(self, "bare", bare)

    verbatim: bool
    bare: str | None


def about(help: str) -> Any:
    """`Annotated[str, about(f"from {names}")]`: the help of an option where a comment cannot hold it."""
    return tyro.conf.arg(help=help)


File = Annotated[str, Word("FILE")]
Folder = Annotated[str, Word("FOLDER")]
Source = Annotated[str, Word("NAME|PATH")]
Checkpoint = Annotated[str, Word("RUN|FOLDER|NAME")]
Name = Annotated[str, Word("NAME")]
Names = Annotated[str, Word("NAME,...")]  # comma-separated
Text = Annotated[str, Word("TEXT", verbatim=True)]
Switch = NoPair[bool]  # --x, without --no-x


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command takes."""

    config: File | None = None  # a YAML file of these options, in lines NAME: VALUE; what is typed wins over the file


# ---------------------------------------------------------------------------------------------------- types of options


def hints(options: type) -> dict[str, Any]:
    """Field -> its annotation."""
    return get_type_hints(options, include_extras=True)


def form_of(hint: Any) -> Form:
    """Of the annotation of a field."""
    word, optional = None, False
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        if get_origin(hint) is Annotated:
            word = next((data for data in hint.__metadata__ if isinstance(data, Word)), word)
            hint = hint.__origin__
        else:
            optional = True
            (hint,) = (option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        each, *others = get_args(hint)
        one = form_of(each)
        if others == [...]:
            return one._replace(words="*", metavar=f"{one.metavar} ...", optional=optional)
        count = 1 + len(others)
        return one._replace(words=count, metavar=" ".join([one.metavar] * count), optional=optional)
    if get_origin(hint) is Literal:
        metavar = f"{{{','.join(get_args(hint))}}}"
    else:
        metavar = {int: "N", float: "X", str: "VALUE", Path: "PATH", bool: ""}[hint]
    if word is None:
        return Form(hint, 1, metavar, optional, False, None)
    return Form(hint, 1 if word.bare is None else "?", word.metavar, optional, word.verbatim, word.bare)


def is_flag(hint: Any) -> bool:
    """Whether a field is --x and --no-x."""
    return form_of(hint).hint is bool


def markers(hint: Any) -> list[Any]:
    """Those of `Positional`, `Repeated` and `NoPair` that a field has."""
    return [data for data in getattr(hint, "__metadata__", ()) if data in (Positional, Repeated, NoPair)]


def _read(form: Form, text: str) -> Any:
    """One value. Raises ValueError that says what is allowed."""
    if form.optional and not form.verbatim and text == "None":
        return None
    if choices := get_args(form.hint):
        if text not in choices:
            raise ValueError(f"allowed are {', '.join(choices)}")
        return text
    try:
        return form.hint(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if form.hint is int else 'a number'}") from None


def value_of(hint: Any, texts: Sequence[str]) -> Any:
    """The value of an option that is no flag, of the words behind it. Raises ValueError that says what is allowed."""
    return _read_all(form_of(hint), texts)


def _read_all(form: Form, texts: Sequence[str]) -> Any:
    """The value of an option with all its words. Raises ValueError."""
    if form.words == "?":
        if len(texts) > 1:
            raise ValueError("expected at most one value")
        return _read(form, texts[0]) if texts else form.bare
    if form.words == 1:
        return _read(form, texts[0])
    if form.optional and not form.verbatim and list(texts) == ["None"]:
        return None
    if isinstance(form.words, int) and len(texts) != form.words:
        raise ValueError(f"expected {form.words} values")
    if not texts:
        raise ValueError("expected at least one value")
    return tuple(_read(form._replace(optional=False), text) for text in texts)


# --------------------------------------------------------------------------------------------------------------- files


def read_file(path: str | Path, options: type) -> dict[str, Any]:
    """The options that a YAML file gives: {name: value}, each of the type that the dataclass `options` has for it.

    What stands there is read as the option's type has it, so that `cuda_graph: off` is the choice "off" and `lr: 1e-3`
    a number, which by themselves are no such things in YAML 1.1.
    Raises FileNotFoundError where there is no such file, and ValueError, with the file and the line, where it is not
    YAML, where an option does not exist or stands there twice, or where a value is of another type.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config is {str(path)!r}, there is no such file")
    try:
        content = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, yaml.MappingNode):
        raise ValueError(f"{path} holds no settings, expected lines such as 'lr: 0.001'")
    known = {name: hint for name, hint in hints(options).items() if name != "config"}
    found: dict[str, Any] = {}
    for key, value in [] if content is None else content.value:
        name = str(key.value).replace("-", "_")
        where = f"{path}, line {key.start_mark.line + 1}"
        if name not in known:
            raise ValueError(f"{where}: setting {str(key.value)!r} is unknown, there are {', '.join(known)}")
        if name in found:
            raise ValueError(f"{where}: setting {name!r} is there twice")
        form = form_of(known[name])
        several = form.words not in (1, "?")
        nodes = value.value if several and isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            raise ValueError(f"{where}: {name} holds more than one value, expected one")
        try:
            found[name] = _from_yaml(form, nodes)
        except ValueError as error:
            said = ", ".join(node.value for node in nodes)
            raise ValueError(f"{where}: {name} is {said!r}, {error}") from None
    return found


def _from_yaml(form: Form, scalars: Sequence[Any]) -> Any:
    """The value that YAML's scalars hold together. Raises ValueError."""
    texts = [scalar.value for scalar in scalars]
    kinds = [scalar.tag.removeprefix("tag:yaml.org,2002:") for scalar in scalars]  # what YAML takes them for
    if get_args(form.hint):  # choices such as off, which YAML takes for something else
        return _read_all(form, texts)
    if "null" in kinds:
        if not form.optional:
            raise ValueError("which is nothing: leave it out, or give a value")
        return None
    if form.hint is bool:
        if kinds != ["bool"]:
            raise ValueError("allowed are true and false")
        return texts[0].lower() in ("true", "yes", "on")
    return _read_all(form, texts)
