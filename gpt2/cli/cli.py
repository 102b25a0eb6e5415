"""The command `fastgpt2`: finds the file of a subcommand and hands the rest of the line to its `main`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import fastgpt2
from fastgpt2.gpt2.output import give_up_stdout, use_any_encoding, visible

PROG = "fastgpt2"
# Name -> (module with `main(argv) -> exit status` and a parser of its own, what it does). Imported when asked for.
COMMANDS = {
    "train": ("gpt2.cli.train", "train a model from scratch on text"),
    "plot": ("gpt2.cli.plot", "overlay the curves of runs"),
    "sample": ("gpt2.cli.sample", "write text with a trained model"),
    "eval": ("gpt2.cli.eval", "measure a model: validation loss, perplexity, HellaSwag"),
    "prepare": ("gpt2.cli.prepare", "encode text into token shards"),
    "verify": ("bench.verify.verify", "compare every kernel with eager PyTorch, float64 and HuggingFace"),
    "bench": ("bench.__main__", "measure kernels and model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Mistakes of a user are one line on standard error and status 2."""
    options, rest = parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    module, _ = COMMANDS[options.command]
    use_any_encoding()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return importlib.import_module(f"fastgpt2.{module}").main([*options.arguments, *rest]) or 0
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who read the output has enough of it: a pipe's end is no mistake
        give_up_stdout()
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"{PROG}: error: {visible(_in_words(error), sys.stderr)}", file=sys.stderr)
        return 2


def _in_words(error: Exception) -> str:
    """Its first line; of the operating system's errors the file and the reason, without a number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A line, without the place in the source that Python adds."""
    print(f"{PROG}: warning: {visible(str(message), sys.stderr)}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """What stands before a command's own options."""
    width = max(map(len, COMMANDS))
    top = argparse.ArgumentParser(
        prog=PROG,
        description="GPT-2 with Triton kernels: train it, sample from it, check it.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"{PROG} {fastgpt2.__version__}"
    top.add_argument("--version", action="version", version=version)
    top.add_argument("--traceback", action="store_true", help="show where an error came from (before the command)")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; each has a --help")
    top.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    return top
