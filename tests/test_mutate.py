"""The mutations fit the kernels as they are, and `mutate.py` tells a caught one from a survivor."""

import dataclasses
import subprocess
import sys

import mutate
import pytest
from _pytest.mark.expression import Expression

MUTATIONS = mutate.read_table(mutate.TABLE.read_text(encoding="utf-8"))


def test_every_text_occurs_once_and_the_mutant_is_python():
    mutate.check_texts(MUTATIONS)
    for mutation in MUTATIONS:
        compile(mutate.mutated(mutation), mutation.file, "exec")
        assert mutation.old != mutation.new, mutation
        assert (mutate.ROOT / "tests" / mutation.test).is_file(), mutation


def test_every_keyword_selects_tests():
    files = sorted({f"tests/{m.test}" for m in MUTATIONS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listed = subprocess.run(command, cwd=mutate.ROOT, capture_output=True, text=True, check=True).stdout.lower()
    for test, keyword in sorted({(m.test, m.keyword) for m in MUTATIONS if m.keyword}):
        ids = [line for line in listed.splitlines() if line.startswith(f"tests/{test}::")]
        selects = Expression.compile(keyword).evaluate
        assert any(selects(lambda word, id=id: word.lower() in id) for id in ids), f"{test} -k {keyword!r}"


NOT_INTERPRETED = ("_overlap.py",)  # what it does is in the compiled code alone: test_overlap.py


def test_every_kernel_file_has_at_least_five():
    for path in (mutate.ROOT / "kernels").glob("*.py"):
        if "@triton.jit" in path.read_text(encoding="utf-8") and path.name not in NOT_INTERPRETED:
            count = sum(m.file == f"kernels/{path.name}" for m in MUTATIONS)
            assert count >= 5, f"tests/mutations.txt: kernels/{path.name} has {count} mistakes, at least 5 are wanted"


def test_no_mutation_is_there_twice():
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)
    assert len({str(m) for m in MUTATIONS}) == len(MUTATIONS)


def test_a_line_that_is_not_understood_is_an_error():
    with pytest.raises(mutate.Broken, match="line 3: 'what'"):
        mutate.read_table("Words.\n# kernels/gelu.py\nwhat\n")


def test_a_text_that_is_gone_is_an_error():
    gone = dataclasses.replace(MUTATIONS[0], old="this is in no kernel")
    with pytest.raises(mutate.Broken, match="0 times in the file"):
        mutate.check_texts([gone])


@pytest.mark.slow
def test_a_mistake_is_caught_and_a_comment_survives():
    first = next(m for m in MUTATIONS if m.file == "kernels/_column_sum.py")
    harmless = dataclasses.replace(first, what="a comment", old="import torch\n", new="import torch  # as ever\n")
    verdicts = {mutation.what: caught for mutation, caught, *_ in mutate.run([first, harmless])}
    assert verdicts == {first.what: True, "a comment": False}


@pytest.mark.slow
def test_tests_that_fail_without_a_mutation_prove_nothing():
    nothing = dataclasses.replace(MUTATIONS[0], keyword="no_test_has_this_name")
    with pytest.raises(mutate.Broken, match="without a mutation: did not run"):
        list(mutate.run([nothing]))
