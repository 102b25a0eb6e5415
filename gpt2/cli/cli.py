"""The command `fastgpt2`: finds the file of a subcommand and hands the rest of the line to its `main`."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import fastgpt2
from fastgpt2.gpt2.command_line import choose
from fastgpt2.gpt2.options import Positional, Switch, Word
from fastgpt2.gpt2.output import give_up_stdout, use_any_encoding, visible

PROG = "fastgpt2"
# Name -> (module with `main(argv) -> exit status` and options of its own, what it does). Imported when asked for.
COMMANDS = {
    "train": ("gpt2.cli.train", "train a model from scratch on text"),
    "plot": ("gpt2.cli.plot", "draw the curves of runs in one picture"),
    "sample": ("gpt2.cli.sample", "write text with a trained model"),
    "eval": ("gpt2.cli.eval", "measure a model: validation loss, perplexity, HellaSwag"),
    "prepare": ("gpt2.cli.prepare", "encode text into token shards"),
    "verify": ("bench.verify.verify", "compare every kernel with eager PyTorch, float64 and HuggingFace"),
    "bench": ("bench.__main__", "measure the speed of kernels and model"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """GPT-2 with Triton kernels: train it, sample from it, check it."""

    command: Positional[Annotated[str | None, Word("COMMAND ...")]] = None  # one of those below; each has a --help
    version: Switch = False  # print the version and end
    traceback: Switch = False  # show where an error came from; this stands before the command


@dataclass
class Result:
    """What is to be known of a command at its end."""

    status: int = 0  # the exit status
    traceback: bool = False  # whether an error also shows where it came from


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. A mistake of the user is one line on standard error and status 2."""
    use_any_encoding()
    with errors_in_a_line() as result:
        commands = {name: what for name, (_, what) in COMMANDS.items()}
        options, rest = choose(Options, commands, sys.argv[1:] if argv is None else argv, PROG)
        result.traceback = options.traceback
        if options.version:
            print(f"{PROG} {fastgpt2.__version__}")
        elif options.command is None:
            raise ValueError(f"no command is given, there are {', '.join(COMMANDS)}; {PROG} --help says what they do")
        else:
            module, _ = COMMANDS[options.command]
            result.status = importlib.import_module(f"fastgpt2.{module}").main(rest) or 0
    return result.status


def in_a_process(command: Callable[[Sequence[str]], int]) -> int:
    """Runs a command that has a process of its own, `python -m`; returns the exit status, with errors as `main` has
    them."""
    use_any_encoding()
    with errors_in_a_line() as result:
        result.status = command(sys.argv[1:])
    return result.status


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[Result]:
    """Around a command: an error becomes a line on standard error and the status of the result, a warning a line."""
    result = Result()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                yield result
            except SystemExit:  # after --help
                _flush()
                raise
        _flush()  # here a reader that has gone away can still be answered
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        result.status = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has enough of it: that is no mistake
        give_up_stdout()
        result.status = 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if result.traceback:
            traceback.print_exc()
        print(f"{PROG}: error: {visible(_in_words(error), sys.stderr)}", file=sys.stderr)
        result.status = 2


def _flush() -> None:
    """Writes out what was printed. Raises BrokenPipeError, or another OSError that names standard output."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        raise OSError(error.errno, error.strerror, "standard output") from None


def _in_words(error: Exception) -> str:
    """Its first line; of an error of the operating system the file and the reason, without a number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A line, without the place in the source that Python adds."""
    print(f"{PROG}: warning: {visible(str(message), sys.stderr)}", file=sys.stderr)
