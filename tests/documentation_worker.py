"""Runs every Python snippet and every command of README.md and docs/ as it stands there, page by page.

python tests/documentation_worker.py FOLDER     exits with 1 and prints what failed; writes into the empty FOLDER only

Started by test_documentation.py with HF_HOME at a hub's cache that holds a small model with GPT-2's name and
vocabulary, and with HF_HUB_OFFLINE. A page's snippets share one namespace, as a reader's session would. Its commands
run in a folder that has the files they name. Training is cut after two steps; everything else is as typed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Beginnings of commands that are not run here, and where they are.
ELSEWHERE = {
    "pip install": ".ci/run installs the package",
    "pytest": ".ci/run runs the tests",
    "python tests/mutate.py": "test_mutate.py",
    "ruff": ".ci/run",
    "mkdir -p .types": ".ci/run",
    "ln -sfn .. .types": ".ci/run",
    "mypy": ".ci/run",
    "pre-commit install": "changes the checkout's git hooks",
    "fastgpt2 verify": "test_verify.py",
    "fastgpt2 bench": "test_bench_*.py, test_compiled.py",
    "torchrun": "needs eight GPUs; test_ranks.py starts torchrun",
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return ((match[1], textwrap.dedent(match[2])) for match in BLOCK.finditer(page.read_text("utf-8")))


def commands(code: str) -> Iterator[str]:
    """The commands of a block, without comments; `a && b` is two."""
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        for is_and, part in itertools.groupby(words, lambda word: word == "&&"):
            if not is_and:
                yield shlex.join(part).replace("'|'", "|")


def is_elsewhere(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in ELSEWHERE)


def run_command(command: str) -> None:
    """In this process, which has PyTorch loaded. Raises RuntimeError for another status than 0."""
    from fastgpt2.gpt2.cli.cli import main

    if not command.startswith(("fastgpt2 ", "cat prompt.txt | fastgpt2 ")):
        raise RuntimeError("it is neither a command of fastgpt2 nor one that ELSEWHERE names")
    if command.startswith("cat "):
        sys.stdin = io.StringIO(Path("prompt.txt").read_text())
        command = command.partition("| ")[2]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(shlex.split(command)[1:])
    if status:
        raise RuntimeError(f"status {status}: {printed.getvalue()[-600:]}")


def run_page(page: Path, done: set[str]) -> list[str]:
    """What failed. A command that another page has too is run once."""
    namespace: dict[str, object] = {"__name__": "documentation"}
    failures = []
    for language, code in blocks(page):
        pieces = [code] if language == "python" else list(commands(code)) if language == "sh" else []
        for piece in pieces:
            if language == "sh" and (is_elsewhere(piece) or piece in done):
                continue
            done.add(piece)
            try:
                if language == "python":
                    exec(compile(code, f"{page.name}, a snippet", "exec"), namespace)
                else:
                    run_command(piece)
            except (Exception, SystemExit):
                failures.append(f"{page.name}:\n{piece}\n{traceback.format_exc(limit=-2)}")
    return failures


def prepare_folder() -> None:
    """The files and runs that the commands name."""
    from tiny_run import settings_in

    from fastgpt2.gpt2.training.train import TrainConfig, train

    text = "".join(f"line {i}: the cat sat on the mat.\n" for i in range(400))
    Path("my_texts").mkdir()
    for name in ("my_texts/a.txt", "my_texts/b.txt", "book.txt"):
        Path(name).write_text(text)
    Path("prompt.txt").write_text("line 3")
    Path("run.yaml").write_text("warmup: 1\n")
    settings = settings_in(Path())
    for name in ("mine", "other", "a", "b"):
        train(TrainConfig(**{**settings, "steps": 4, "eval_interval": 2, "out": f"runs/{name}"}))


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    """Training ends after two steps, and GPT-2's vocabulary needs no download: it is 256 bytes and pairs of them."""
    from unittest import mock

    from fastgpt2.gpt2.data import tokenizer
    from fastgpt2.gpt2.training import train

    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    tokens = [*(bytes([i]) for i in range(256)), *itertools.islice(pairs, 50_000)]
    vocabulary = tokenizer.BPETokenizer({token: i for i, token in enumerate(tokens)})
    whole = train.train

    def two_steps(config, *args, **settings):
        return whole(dataclasses.replace(config, steps=2, eval_interval=2, eval_tokens=512), *args, **settings)

    with mock.patch.object(train, "train", two_steps), mock.patch.object(tokenizer, "gpt2", lambda: vocabulary):
        yield


def main() -> int:
    os.chdir(sys.argv[1])
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_folder()
    with shortened(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done: set[str] = set()
        failures = [failure for page in PAGES for failure in run_page(page, done)]
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
