"""The loops that users copy run as they stand."""

import ast
import contextlib
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from fastgpt2 import GPT

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses(name: str, capsys) -> list[float]:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]


def test_a_loop_of_twenty_lines_learns(capsys):
    no_gpu = pytest.warns(UserWarning, match="the step runs without CUDA graphs: the model is on cpu")
    with contextlib.nullcontext() if torch.cuda.is_available() else no_gpu:
        found = losses("own_loop.py", capsys)
    assert len(found) == 5 and found[-1] < found[0] - 0.2
    code = [line for line in (EXAMPLES / "own_loop.py").read_text().splitlines() if line and line[0] != '"']
    assert len([line for line in code if "import" not in line]) <= 20


@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_accelerate_learns(capsys, tmp_path, monkeypatch):
    state = pytest.importorskip("accelerate.state")
    monkeypatch.chdir(tmp_path)
    try:
        found = losses("accelerate_loop.py", capsys)
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    assert len(found) == 5 and found[-1] < found[0] - 0.2
    assert GPT.from_pretrained(tmp_path / "own_gpt").config.n_layer == 2


@pytest.mark.filterwarnings("ignore")  # accelerate's and transformers' own
def test_the_trainer_saves_and_goes_on(tmp_path, monkeypatch):
    """From a checkpoint in the middle to the same weights as without a break."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.chdir(tmp_path)
    code = (EXAMPLES / "hf_trainer.py").read_text()
    assert "save_strategy" not in code and code.count("max_steps=100") == 1
    code = code.replace("max_steps=100", "max_steps=6, save_steps=3")
    weights = []
    try:
        for _ in range(2):
            exec(code, {"__name__": "__main__"})
            weights.append(GPT.from_pretrained("own_gpt").state_dict())
            shutil.rmtree("hf_trainer/checkpoint-6")
            assert [path.name for path in Path("hf_trainer").glob("checkpoint-*")] == ["checkpoint-3"]
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_say_how_to_run_them(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert f"examples/{path.name}" in said
