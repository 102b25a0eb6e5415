"""Breaks every kernel on purpose and shows that the tests notice.

    python tests/mutate.py [--only attention] [--list] [--jobs 2]

Each entry of `mutations.txt` is applied to a copy of the checkout in a temporary folder, and the named tests run there.
A mutation that no test fails is printed as "SURVIVED" and makes the exit status 1. The tests pass on the unbroken copy
first: a failure for another reason would prove nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutations.txt")
OUTPUT = "pytest.txt"
LIMIT_S = 300  # a broken loop may never end
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")

# A server that has these imported forks for each mutation: importing them takes longer than most of the tests.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "triton", "pytest", "numpy"])


class Broken(Exception):
    """A mutation that cannot be judged: its text is gone, or its tests do not run."""


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; the tests of `test` that match `keyword` must fail."""

    file: str
    test: str
    keyword: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    @property
    def module(self) -> str:
        return "fastgpt2." + self.file.removesuffix(".py").replace("/", ".")


def read_table(text: str) -> list[Mutation]:
    """The entries of mutations.txt, which says how they look. Raises Broken for a line that is not understood."""
    mutations: list[Mutation] = []
    file = head = None
    old: list[str] = []
    new: list[str] = []
    for number, line in enumerate([*text.splitlines(), "# end"], start=1):
        if line.startswith(("# ", "[")) and head:
            mutations.append(Mutation(file or "", *head, "\n".join(old), "\n".join(new)))
            head = None
        if line.startswith("# "):
            file = line[2:]
        elif header := re.fullmatch(r"\[(\S+) -k (.+)\] (.+)", line):
            head, old, new = header.groups(), [], []
        elif head and line[:1] in ("-", "+") and line[1:2] in ("", " "):
            (old if line[0] == "-" else new).append(line[2:])
        elif line and file:
            raise Broken(f"{TABLE.name}, line {number}: {line!r}")
    return mutations


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the mutation. Raises Broken unless its `old` text is there exactly once."""
    text = (root / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise Broken(f"{mutation}: {count} times in the file, expected once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def check_texts(mutations: list[Mutation]) -> None:
    """Raises Broken, naming all of them, where mutations no longer fit the checkout."""
    broken = []
    for mutation in mutations:
        try:
            mutated(mutation)
        except Broken as reason:
            broken.append(str(reason))
    if broken:
        raise Broken("\n".join(broken))


class OnlyTheCopy:
    """A pytest plugin: what is tested must be the copy, although the package may be installed in editable mode."""

    def __init__(self, copy: str, modules: list[str]):
        self.copy, self.modules = copy, modules

    def pytest_collection_finish(self, session):
        for module in self.modules:
            file = str(importlib.import_module(module).__file__)
            if not file.startswith(self.copy):
                pytest.exit(f"{module} was imported from {file}", returncode=9)


def _run_pytest(folder: str, arguments: list[str], modules: list[str]) -> None:
    """In a process of its own: pytest in the copy below `folder`, its output in a file there, its status the exit."""
    copy = os.path.join(folder, "fastgpt2")
    with open(os.path.join(folder, OUTPUT), "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = folder
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # a mutation may leave a file's size and second of change as they were
    sys.exit(int(pytest.main(arguments, plugins=[OnlyTheCopy(copy, modules)])))


def pytest_run(folder: Path, test: str, keyword: str, modules: set[str], limit_s: float = LIMIT_S) -> tuple[str, str]:
    """Runs tests in the copy below `folder`: ("passed", "failed" or "did not run", the reason)."""
    options = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    arguments = (str(folder), [f"tests/{test}", "-k", keyword, *options], sorted(modules))
    process = PROCESSES.Process(target=_run_pytest, args=arguments)
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "failed", f"{test}: ran longer than {limit_s:.0f} s"
    if process.exitcode == 0:
        return "passed", ""
    if process.exitcode < 0:
        return "failed", f"{test}: killed by signal {-process.exitcode}"
    output = (folder / OUTPUT).read_text(encoding="utf-8")
    # A fixture that fails is an error of its tests. Errors of collection name no test, and have another exit code.
    first = re.search(r"^(?:FAILED|ERROR) tests/(.*::.*)$", output, re.MULTILINE)
    if process.exitcode != 1 or not first:
        return "did not run", output.strip()[-2000:]
    return "failed", first[1]


def make_copy(folder: Path) -> Path:
    shutil.copytree(ROOT, folder / "fastgpt2", ignore=NOT_COPIED)
    return folder


def judge(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """(caught, by what) of one mutation in the copy below `folder`, which is whole again afterwards."""
    path = folder / "fastgpt2" / mutation.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutation, folder / "fastgpt2"), encoding="utf-8")
    try:
        verdict, why = pytest_run(folder, mutation.test, mutation.keyword, {mutation.module})
    finally:
        path.write_text(whole, encoding="utf-8")
    if verdict == "did not run":
        raise Broken(f"{mutation}: the tests did not run:\n{why}")
    return verdict == "failed", why


def check_unbroken(mutations: list[Mutation], folder: Path) -> None:
    """Raises Broken unless every test that a mutation names passes without it."""
    for test in sorted({m.test for m in mutations}):
        mine = [m for m in mutations if m.test == test]
        keywords = sorted({m.keyword for m in mine})
        keyword = "" if "" in keywords else " or ".join(f"({k})" for k in keywords)
        verdict, why = pytest_run(folder, test, keyword, {m.module for m in mine}, LIMIT_S * len(keywords))
        if verdict != "passed":
            raise Broken(f"{test} -k {keyword!r} without a mutation: {verdict}\n{why}")


def run(mutations: list[Mutation], jobs: int = 1) -> Iterator[tuple[Mutation, bool, str, float]]:
    """(mutation, caught, by what, seconds), as they are done."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, in the server: conftest.py is too late
    with tempfile.TemporaryDirectory() as temporary:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            copies.put(make_copy(Path(temporary).resolve() / str(i)))
        check_unbroken(mutations, copies.queue[0])

        def timed(mutation: Mutation) -> tuple[Mutation, bool, str, float]:
            folder, start = copies.get(), time.perf_counter()
            try:
                return mutation, *judge(mutation, folder), time.perf_counter() - start
            finally:
                copies.put(folder)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for done in concurrent.futures.as_completed([pool.submit(timed, m) for m in mutations]):
                yield done.result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in file or description")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default 1)")
    arguments = parser.parse_args(argv)
    chosen = [m for m in read_table(TABLE.read_text(encoding="utf-8")) if arguments.only in str(m)]
    if not chosen:
        parser.error(f"--only {arguments.only!r}: no such mutation")
    if arguments.list:
        print(*chosen, sep="\n")
    check_texts(chosen)
    if arguments.list:
        return 0
    survivors, start = [], time.perf_counter()
    for mutation, caught, why, seconds in run(chosen, arguments.jobs):
        print(f"{'caught' if caught else 'SURVIVED'}  {mutation}  ({seconds:.0f} s)  {why[:150]}", flush=True)
        survivors += [] if caught else [mutation]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught in {(time.perf_counter() - start) / 60:.1f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as broken:
        sys.exit(f"error: {broken}")
