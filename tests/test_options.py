"""Options of every command: from the command line, from a file, and in --help."""

import dataclasses
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_cli import failed

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.audit.compiled import Options as Compiled
from fastgpt2.bench.audit.traffic import CountingOptions
from fastgpt2.gpt2 import options
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.options import CommandOptions, Positional, Repeated, Switch, Text, Word, read_file

COMMANDS = {
    **{name: importlib.import_module(f"fastgpt2.{module}").Options for name, (module, _) in cli.COMMANDS.items()},
    **{f"bench {module.__name__.rpartition('.')[2]}": module.Options for module in bench.COMMANDS},
}
del COMMANDS["bench"]
PROCESSES = {"compiled": Compiled, "traffic": CountingOptions}
EVERY = pytest.mark.parametrize("name", [*COMMANDS, *PROCESSES])


@dataclass(frozen=True, kw_only=True)
class Some(CommandOptions):
    """Says what it was given."""

    runs: Positional[tuple[typing.Annotated[str, Word("RUN")], ...]]  # folders
    steps: int | None = None  # how many
    lr: float = 0.1  # how fast
    text: Text | None = None  # how it begins
    kind: typing.Literal["on", "off"] = "on"  # which one
    check: bool = True  # look twice
    loud: Switch = False  # say it aloud
    source: tuple[Path, ...] = ()  # where it comes from
    pair: tuple[Path, Path] | None = None  # two of them
    line: Repeated[tuple[str, ...]] = ()  # several times
    score: typing.Annotated[str | None, Word("FILE", bare="download")] = None  # from a file


def read(*argv: str) -> Some:
    return parse(Some, argv, "some")


# ------------------------------------------------------------------------------------------------------- command line


def test_words_become_values_of_the_fields_types():
    found = read("a", "b", "--steps=-3", "--lr", "-1e-3", "--text", "None", "--kind", "off", "--no-check", "--loud")
    assert found == Some(runs=("a", "b"), steps=-3, lr=-1e-3, text="None", kind="off", check=False, loud=True)
    found = read("a", "--source", "x", "y", "--pair", "p", "q", "--line", "1", "--line", "2", "--score")
    assert (found.source, found.pair) == ((Path("x"), Path("y")), (Path("p"), Path("q")))
    assert (found.line, found.score) == (("1", "2"), "download")
    found = read("--score", "f", "--steps", "None", "--text=--x", "--", "-a")
    assert (found.score, found.steps, found.text, found.runs) == ("f", None, "--x", ("-a",))


def test_an_option_can_be_written_with_underscores_and_as_its_beginning():
    assert read("a", "--sou", "x", "--st=4") == Some(runs=("a",), source=(Path("x"),), steps=4)
    found = parse(
        COMMANDS["sample"], ["--checkpoint", "c", "--max_new_tokens", "3", "--temp", "2", "--no-ch"], "sample"
    )
    assert (found.max_new_tokens, found.temperature, found.check) == (3, 2.0, False)


def test_the_last_of_two_counts():
    assert read("a", "--steps", "1", "--steps", "2", "--check", "--no-check") == Some(runs=("a",), steps=2, check=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "some needs RUN ...: some --help says more"),
        ("a --steps many", "--steps is 'many', expected a whole number"),
        ("a --steps 1.5", "--steps is '1.5', expected a whole number"),
        ("a --lr fast", "--lr is 'fast', expected a number"),
        ("a --kind of", "--kind is 'of', allowed are on, off"),
        ("a --steps", "--steps needs N behind it"),
        ("a --pair x", "--pair needs PATH PATH behind it"),
        ("a --source", "--source is '', expected at least one value"),
        ("a --score x y", "--score is 'x y', expected at most one value"),
        ("a --setps 3", "some has no option --setps, the nearest is --steps"),
        ("a --s 3", "some has no option --s, the nearest is --"),  # steps, source and score begin so
        ("a --no-loud", "some has no option --no-loud, the nearest is --loud"),
        ("a --check=1 --pair x y z", "some has no use for '1': a value stands behind its option"),
        ("a --text -x", "--text needs TEXT behind it; a value that begins with - is typed --text=VALUE"),
    ],
)
def test_a_mistake_is_named(argv, message, capfd):
    with pytest.raises(ValueError) as error:
        read(*argv.split())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "tyro prints nothing by itself"


# ------------------------------------------------------------------------------------------------------ every command


def examples(kind: type) -> tuple[list[str], dict]:
    """(words that give every option of a command a value of its own, the same as the content of a file)."""
    argv, content = [], {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        form = options.form_of(hint)
        flag = "--" + name.replace("_", "-")
        if name == "config":
            continue
        if form.hint is bool:
            content[name] = not getattr(kind, name)
            argv.append(flag if content[name] else flag.replace("--", "--no-"))
            continue
        others = [choice for choice in typing.get_args(form.hint) if choice != getattr(kind, name)]
        one = {int: 7, float: 0.5}.get(form.hint) or (*others, "word")[0]
        content[name] = one if form.words in (1, "?") else [one, one]
        words = [str(one)] * (1 if form.words in (1, "?") else 2)
        if Positional in options.markers(hint):
            argv = [*words, *argv]
        elif Repeated in options.markers(hint):
            argv += [word for each in words for word in (flag, each)]
        else:
            argv += [flag, *words]
    return argv, content


@EVERY
def test_a_file_and_the_command_line_say_the_same(name, tmp_path):
    kind = {**COMMANDS, **PROCESSES}[name]
    argv, content = examples(kind)
    typed = parse(kind, argv, name)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(content))
    assert dataclasses.replace(parse(kind, ["--config", str(file)], name), config=None) == typed
    for field in dataclasses.fields(kind):
        if field.name != "config" and field.default is not dataclasses.MISSING:
            assert getattr(typed, field.name) != field.default, field.name
    if content:
        (first, *_) = content
        file.write_text(f"{first}: {{a: b}}\n")
        with pytest.raises(ValueError, match=rf"options.yaml, line 1: {first} (holds more than one value|is )"):
            parse(kind, ["--config", str(file)], name)


def test_what_is_typed_wins_over_the_file(tmp_path):
    (tmp_path / "o.yaml").write_text("runs: [x, y]\nsteps: 3\nkind: off\ncheck: off\nline: one\nlr: 1e-3\n")
    found = read("--config", str(tmp_path / "o.yaml"), "--steps", "4", "--line", "two")
    assert found == Some(
        config=str(tmp_path / "o.yaml"), runs=("x", "y"), steps=4, kind="off", check=False, line=("two",), lr=1e-3
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: 1\nstesp: 3", "line 2: setting 'stesp' is unknown, there are runs, steps, lr"),
        ("config: other.yaml", "setting 'config' is unknown"),
        ("steps: 1\nsteps: 3", "line 2: setting 'steps' is there twice"),
        ("kind: of", "kind is 'of', allowed are on, off"),
        ("check: 1", "check is '1', allowed are true and false"),
        ("lr: ", "lr is '', which is nothing"),
        ("steps: [1, 2]", "steps holds more than one value"),
        ("pair: [a]", "pair is 'a', expected 2 values"),
        ("source: []", "source is '', expected at least one value"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "o.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_file(tmp_path / "o.yaml", Some)
    assert str(error.value).startswith(f"{tmp_path / 'o.yaml'}, line ")


def test_every_command_tells_of_a_mistake_in_a_line(capsys):
    for name in COMMANDS:
        said = failed(capsys, *name.split(), "--no-such-option")
        assert said.startswith(f"fastgpt2: error: fastgpt2 {name} has no option --no-such-option, the nearest is --")
        assert "there is no such file" in failed(capsys, *name.split(), "--config", "no-such.yaml")


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["", "bench", *COMMANDS])
def test_help_is_plain_text_of_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and not err
    assert out.startswith(f"usage: fastgpt2 {name}".rstrip()) and out.isascii() and out.isprintable() is False
    assert max(map(len, out.splitlines())) <= 80 and not set("|+\x1b") & set(re.sub(r"[A-Z]\|[A-Z]", "", out))
    if name not in ("", "bench"):
        said = " ".join(out.split())
        for field in dataclasses.fields(COMMANDS[name]):
            option = "RUN ..." if field.name == "runs" else "FILE ..." if field.name == "files" else None
            option = option or f"--{field.name.replace('_', '-')}"
            # The option, its values, and words of its own before the default.
            assert re.search(rf"{re.escape(option)}[],]?( .*?)? [^(-].*?\((default: |required|repeatable)", said), (
                option
            )


def test_help_shows_what_is_required_and_the_defaults_of_a_file(tmp_path, capsys):
    (tmp_path / "o.yaml").write_text("steps: 77\n")
    with pytest.raises(SystemExit):
        read("--config", str(tmp_path / "o.yaml"), "--help", "--lr", "nonsense", "--unknown")
    said = capsys.readouterr().out
    assert "how many (default: 77)" in said and "folders (required)" in said and "--loud " in said
    assert "--check, --no-check" in said and "--no-loud" not in said


def command(*arguments, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize("arguments", [["fastgpt2.gpt2", "--help"], ["fastgpt2.gpt2", "train", "--help"]], ids=str)
def test_help_that_nobody_reads_ends_quietly(arguments):
    process = command(*arguments)
    process.stdout.close()
    process.stdout = None
    assert (process.communicate()[1], process.returncode) == (b"", 128 + signal.SIGPIPE)


def test_help_is_printed_in_any_encoding():
    process = command("fastgpt2.gpt2", "eval", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert process.returncode == 0 and not err and out.startswith(b"usage: fastgpt2 eval")


def test_modules_that_run_by_themselves_say_a_mistake_in_a_line():
    for module, wrong, said in (
        ("fastgpt2.bench", ["ops", "--op", "gelo"], "--op is 'gelo', allowed are"),
        ("fastgpt2.bench.audit.traffic", ["--jsno", "x"], "has no option --jsno, the nearest is --json"),
    ):
        process = command(module, *wrong)
        err = process.communicate()[1].decode()
        assert process.returncode == 2 and err.startswith("fastgpt2: error: ") and said in err
        assert len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- single commands


def test_an_evaluation_that_nobody_reads_ends_quietly(tmp_path, monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    from tiny_models import tiny

    from fastgpt2.gpt2.data.tokenizer import ByteTokenizer

    tiny(vocab_size=256).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setattr(sys, "stdout", Gone())
    arguments = ["eval", "--checkpoint", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert cli.main(arguments) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_kernels_of_the_environment_are_named_by_the_variable(tmp_path, monkeypatch, capsys):
    from tiny_models import tiny

    from fastgpt2.gpt2.data.tokenizer import ByteTokenizer

    tiny(vocab_size=256).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    monkeypatch.setenv("FASTGPT2_KERNELS", "atention")
    said = failed(capsys, "sample", "--checkpoint", str(tmp_path), "--prompt", "a", "--device", "cpu")
    assert "the environment variable FASTGPT2_KERNELS is 'atention'" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--prompt", "a", "--file", "b"],
            "--prompt and --file are given together, allowed is one of --prompt, --file",
        ),
        (["--prompt", "a", "--json", "--stream"], "--stream and --json are given together, allowed is one of --stream"),
    ],
)
def test_options_that_exclude_each_other(argv, message, capsys):
    assert message in failed(capsys, "sample", "--checkpoint", "none", *argv)


def test_a_reference_is_a_name_and_a_loss(capsys):
    assert "--reference is 'GPT-2', expected NAME=LOSS" in failed(capsys, "plot", "none", "--reference", "GPT-2")
