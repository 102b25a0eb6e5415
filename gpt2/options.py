"""What a command takes, as one frozen dataclass: read from the command line and from a YAML file in the same way.

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

    parse(Options, argv, "fastgpt2 eval")

Only this module calls tyro. tyro decides which words belong to which option and writes the help. What the words mean is
decided here by the type of the field, so that a value in a file and a value on the command line are the same value, and
a mistake in either is one line.
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
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tyro.conf import FlagCreatePairsOff as NoPair
from tyro.conf import Positional as Positional
from tyro.conf import UseAppendAction as Repeated
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")


def _in_help(value: Any) -> list[str]:
    """A default."""
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
            str_from_instance=_in_help,
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

    config: File | None = None  # a YAML file of these options, such as the line `device: cpu`; typed options go over it


# ---------------------------------------------------------------------------------------------------- types of options


def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options, include_extras=True)


def _form(hint: Any) -> Form:
    """Of the annotation of a field that is no flag."""
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
        one = _form(each)
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


def _is_flag(hint: Any) -> bool:
    return _form(hint).hint is bool


def _markers(hint: Any) -> list[Any]:
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


def _value(hint: Any, texts: Sequence[str]) -> Any:
    return _read_all(_form(hint), texts)


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


# ------------------------------------------------------------------------------------------------------- command line


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
                self.values[name] = words if isinstance(words, bool) else _value(_hints(options)[name], words)
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
            print(_help(self._options, self._prog, usual) + self._epilog, flush=True)
            raise SystemExit(0)
        for name in required:
            if name not in self.values:
                metavar, shown = _form(_hints(self._options)[name]).metavar, _shown(self._options, name)
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
    for name, hint in _hints(options).items():
        kind: tuple[Any, ...] = (tuple[str, ...] | None, _spec(_form(hint)))
        default: Any = None
        if _is_flag(hint):
            kind = (bool | None, tyro.conf.DisallowNone)
        elif Repeated in _markers(hint):
            kind, default = (tuple[str, ...],), ()
        parts = (*kind, *_markers(hint))
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
        str_from_instance=_in_help,
    )


def _required(options: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(options) if f.default is missing and f.default_factory is missing]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(options: type, name: str) -> str:
    """An option as it is typed; what stands behind no option as the help calls it."""
    hint = _hints(options)[name]
    return _form(hint).metavar if Positional in _markers(hint) else _flag(name)


def _flags(options: type) -> list[str]:
    """All that begins with -- and can be typed."""
    hints = {_flag(name): hint for name, hint in _hints(options).items() if Positional not in _markers(hint)}
    pairs = [f"--no-{flag[2:]}" for flag, hint in hints.items() if _is_flag(hint) and NoPair not in _markers(hint)]
    return [*hints, *pairs, "--help"]


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
    if lacking := re.search(r"Missing value for argument '--([^']+)'", box):
        flag, name = f"--{lacking[1]}", lacking[1].replace("-", "_")
        metavar = _form(_hints(options)[name]).metavar
        return f"{flag} needs {metavar} behind it; a value that begins with - is typed {flag}=VALUE"
    return f"{prog}: {' '.join(_plain(box).split())}"


def _plain(text: str) -> str:
    """tyro's text without its boxes and rules; titles end in a colon."""
    text = re.sub(r"(?m) +$", "", text)
    text = re.sub(r"(?m)^ ?(\S.*)\n ?[-─]{5,}$", r"\1:", text)
    text = re.sub(r"(?m)^[╭+][─-]+ (.*?) [─-]*[╮+]$", r"\1:", text)
    text = re.sub(r"(?m)^[╰+][─-]+[╯+]$", "", text)
    return re.sub(r"(?m)^[│|] (.*?) *[│|]$", r"  \1", text)


def _width() -> int:
    return min(80, shutil.get_terminal_size().columns)


def _help(options: type, prog: str, default: Any) -> str:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def shown(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if Repeated in info.markers and info.type_origin is tuple:
            return None
        try:
            form = _form(info.type)
        except (KeyError, TypeError, ValueError):  # tyro asks for parts of types too, and for the dataclass itself
            return None
        return None if form.hint is bool else _spec(form)

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        description = " ".join((inspect.getdoc(options) or "").split())
        tyro.cli(options, args=["--help"], prog=prog, description=description, default=default, registry=registry)
    # tyro does not call words that stand behind no option required.
    lines = _plain(text.getvalue()).replace("(default: )", "(required)").rstrip().splitlines()
    return "\n".join(line if len(line) <= _width() else textwrap.fill(line, _width()) for line in lines)


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
    hints = {name: hint for name, hint in _hints(options).items() if name != "config"}
    found: dict[str, Any] = {}
    for key, value in [] if content is None else content.value:
        name = str(key.value).replace("-", "_")
        where = f"{path}, line {key.start_mark.line + 1}"
        if name not in hints:
            raise ValueError(f"{where}: setting {str(key.value)!r} is unknown, there are {', '.join(hints)}")
        if name in found:
            raise ValueError(f"{where}: setting {name!r} is there twice")
        form = _form(hints[name])
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
