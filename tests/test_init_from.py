"""Fine-tuning: a run that begins with weights that are there, and goes on as any other; runs made longer."""

import dataclasses
import json
import shutil

import pytest
import torch
from foreign_formats import write_llmc, write_nanogpt
from hf_models import hf_gpt2, write_folder
from tiny_run import TINY, finish, run, settings_in

from fastgpt2 import GPT
from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.cli.train import parse
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer, CharTokenizer
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train
from fastgpt2.gpt2.training.train_config import read_settings

pytestmark = pytest.mark.usefixtures("quick_runs")
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=16)
LITTLE = {**TINY, **SIZES, "steps": 4, "eval_interval": 2, "eval_tokens": 32, "tokenizer": None, "warmup": 2}


@pytest.fixture(scope="module")
def hf():
    return hf_gpt2(vocab_size=256, n_positions=24)


@pytest.fixture
def text(tmp_path):
    return settings_in(tmp_path)["data"]


@pytest.fixture
def source(tmp_path, hf):
    """A HuggingFace folder with a tokenizer of bytes."""
    folder = write_folder(tmp_path / "source", hf)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def settings(tmp_path, text, source):
    return {**LITTLE, "data": text, "out": str(tmp_path / "run"), "init_from": str(source)}


def begun_with(settings, **more):
    """The weights of a run's model before its first step, and the run."""
    weights = {}
    step = Trainer.step

    def first(self, at):
        if at == 1:
            weights.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return step(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", first)
        return weights, run(settings, **more)


# ------------------------------------------------------------------------------------------------------ the beginning


def test_a_run_begins_with_huggingfaces_weights_and_tokenizer(settings, hf, source):
    weights, (result, log, said) = begun_with(settings)
    theirs = GPT.from_pretrained(source)
    theirs.crop_block_size(16)
    for name, expected in theirs.named_parameters():
        assert torch.equal(weights[name], expected), name
    assert not torch.equal(result.model.transformer.wte.weight, theirs.transformer.wte.weight), "it was not trained"
    assert result.tokenizer == ByteTokenizer() and log[0]["step"] == 1 and f"from    {source}" in said
    assert log[0]["lr"] == TrainConfig(**settings).lr / settings["warmup"], "the schedule begins at its own step 0"
    saved = read_settings(result.folder / "config.yaml")
    assert saved["init_from"] == str(source) and saved["n_layer"] == 2 and saved["block_size"] == 16
    model, tokenizer = load_checkpoint(result.folder)
    assert model.config.block_size == 16 and tokenizer == ByteTokenizer()


def test_every_kind_of_checkpoint_is_one_to_begin_with(settings, tmp_path, hf, source):
    first, _, _ = run(settings, out=str(tmp_path / "first"))
    nanogpt = write_nanogpt(tmp_path / "nanogpt", hf)
    llmc = write_llmc(tmp_path / "a.bin", hf)
    kinds = {"run": first.folder, "checkpoint": first.folder / "checkpoint", "nanogpt": nanogpt, "llmc": llmc}
    for name, path in kinds.items():
        more = {"tokenizer": "byte"} if path in (nanogpt, llmc) else {}
        weights, (result, _, _) = begun_with(settings, init_from=str(path), out=str(tmp_path / f"from {name}"), **more)
        expected = GPT.from_pretrained(path)
        assert torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], expected.transformer.h[1].mlp.c_fc.weight)
        assert result.model.config.activation == expected.config.activation
        assert load_checkpoint(result.folder)[0].config.activation == expected.config.activation
    _, (result, _, _) = begun_with(
        {**settings, "out": str(tmp_path / "no bias"), "tokenizer": "byte"},
        init_from=str(write_nanogpt(tmp_path / "b", hf_gpt2(vocab_size=256), bias=False)),
    )
    assert not result.model.config.bias and not load_checkpoint(result.folder)[0].config.bias


def test_dropout_and_padding_are_the_runs_own(settings):
    result, _, _ = run(settings, dropout=0.3, vocab_multiple=100)
    config = result.model.config
    assert (config.dropout, config.padded_vocab_size, config.vocab_size) == (0.3, 300, 256)


def test_triton_is_refused_for_an_activation_that_it_has_not(settings, tmp_path, hf):
    path = write_nanogpt(tmp_path / "nanogpt", hf)
    with pytest.raises(ValueError, match="mlp on Triton, which computes GELU by tanh"):
        run(settings, init_from=str(path), kernels="mlp", tokenizer="byte")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(n_layer=3), "n_layer is 3, and the model of init_from, .*source, has 2"),
        (dict(n_head=4), "n_head is 4, and the model of init_from, .*source, has 2"),
        (dict(n_embd=64), "n_embd is 64, and the model of init_from, .*source, has 32"),
        (dict(block_size=25), "block_size is 25, and the model of init_from, .*source, has 24 positions"),
        (dict(init_from="/no/such/folder"), "/no/such/folder is neither a folder"),
    ],
)
def test_sizes_that_are_not_the_checkpoints_are_named(settings, tmp_path, wrong, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(settings, **wrong)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_may_be_smaller_than_the_table_and_not_larger(settings, tmp_path, source):
    small = write_folder(tmp_path / "small", hf_gpt2(vocab_size=200))
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, and the token table of .*small 200"):
        run(settings, init_from=str(small), tokenizer="byte")
    result, _, said = run(settings, tokenizer="char")
    assert isinstance(result.tokenizer, CharTokenizer) and result.tokenizer.vocab_size < 100
    assert f"the text's tokenizer is not {source}'s" in said
    model, tokenizer = load_checkpoint(result.folder)
    assert model.config.vocab_size == 256 and tokenizer == result.tokenizer
    assert cli.main(["sample", "--checkpoint", str(result.folder), "--prompt", "line", "--max-new-tokens", "9"]) == 0


def test_char_is_the_checkpoints_own_where_it_has_characters(settings, tmp_path, text, source):
    own = CharTokenizer("".join(sorted(set("line the cat sat on the mat.:0123456789\nxyz"))))
    folder = write_folder(tmp_path / "chars", hf_gpt2(vocab_size=own.vocab_size))
    own.save(folder)
    for spec in (None, "char"):
        result, _, said = run(settings, init_from=str(folder), tokenizer=spec, out=str(tmp_path / f"run {spec}"))
        assert result.tokenizer == own and "note" not in said


def test_a_checkpoint_without_a_tokenizer_says_so(settings, tmp_path, hf):
    folder = write_folder(tmp_path / "bare", hf)
    with pytest.raises(FileNotFoundError, match="bare holds no tokenizer.json.*its 256 tokens are not GPT-2's"):
        run(settings, init_from=str(folder))


# ----------------------------------------------------------------------------------------------------------- going on


def test_a_run_goes_on_without_its_source(settings, source, monkeypatch, tmp_path):
    whole, log, _ = run(settings, out=str(tmp_path / "whole"), dropout=0.1)
    step = Trainer.step

    def killed(self, at):
        if at == 4:
            raise RuntimeError("killed")
        return step(self, at)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(settings, dropout=0.1)
    monkeypatch.setattr(Trainer, "step", step)
    shutil.rmtree(source)
    result, resumed, _ = finish(None, resume=tmp_path / "run")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in log]
    for name, p in result.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    config, *_ = parse(["--resume", str(tmp_path / "run")])
    assert config.init_from == str(source)
    with pytest.raises(ValueError, match="init_from is 'gpt2', the run .* was begun with"):
        train(dataclasses.replace(config, init_from="gpt2"), resume=tmp_path / "run")


def test_a_finished_run_is_made_longer(settings, tmp_path):
    long, expected, _ = run(settings, out=str(tmp_path / "long"), steps=8)
    run(settings)
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "8"]) == 0
    result, log, _ = finish(None, resume=tmp_path / "run")  # which is at its end, and knows that it is 8
    assert result.steps == 8 and read_settings(tmp_path / "run" / "config.yaml")["steps"] == 8
    assert [r["lr"] for r in log[4:]] == [r["lr"] for r in expected[4:]], "the rate of a run of that length"
    assert [r["lr"] for r in log[:4]] != [r["lr"] for r in expected[:4]]
    with pytest.raises(ValueError, match="steps is 6, the run .* was begun with 8"):
        train(dataclasses.replace(parse(["--resume", str(tmp_path / "run")])[0], steps=6), resume=tmp_path / "run")


def test_a_run_of_an_older_version_has_no_such_setting(settings, tmp_path):
    run({**settings, "init_from": None, "tokenizer": "byte"})
    (path,) = (tmp_path / "run" / "checkpoints").glob("*4/training.pt")
    state = torch.load(path)
    del state["config"]["init_from"]
    torch.save(state, path)
    files = path.with_name("files.json")
    known = json.loads(files.read_text())
    from fastgpt2.gpt2.weights.checkpoints import _fingerprint

    files.write_text(json.dumps({**known, "training.pt": _fingerprint(path)}))
    lines = (tmp_path / "run" / "config.yaml").read_text().splitlines()
    (tmp_path / "run" / "config.yaml").write_text("\n".join(x for x in lines if not x.startswith("init_from")))
    assert finish(None, resume=tmp_path / "run")[0].steps == 4


def test_another_folder_than_the_runs_is_refused(settings, tmp_path):
    run(settings)
    config = TrainConfig(**settings)
    with pytest.raises(ValueError, match="out is 'elsewhere', and .*run goes on where it is"):
        train(dataclasses.replace(config, out="elsewhere"), resume=tmp_path / "run")
    assert train(config, resume=tmp_path / "run").steps == 4


# ---------------------------------------------------------------------------------------------------- the command line


def test_sizes_come_from_the_checkpoint_unless_they_are_given(source, tmp_path):
    config = parse(["--init-from", str(source), "--device", "cpu"]).config
    assert (config.preset, config.n_layer, config.n_head, config.n_embd, config.block_size) == (
        "finetune-smoke",
        2,
        2,
        32,
        24,
    )
    assert TrainConfig.from_preset("finetune", init_from=str(source), block_size=8).n_layer == 2
    config = parse(["--init-from", str(source), "--preset", "gpt2-smoke", "--block-size", "8", "--n-layer", "5"]).config
    assert (config.n_layer, config.n_head, config.block_size, config.lr) == (5, 2, 8, 6e-4)
    (tmp_path / "a.yaml").write_text(f"init_from: {source}\nn_head: 1\n")
    config = parse(["--config", str(tmp_path / "a.yaml"), "--device", "cpu"]).config
    assert (config.n_head, config.n_layer, config.preset) == (1, 2, "finetune-smoke")


def test_the_command_fine_tunes(source, text, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--init-from", str(source), "--data", text, "--out", str(out), "--device", "cpu"]
    assert cli.main([*command, "--steps", "2", "--eval-tokens", "24"]) == 0
    said = capsys.readouterr().out
    assert "finetune at a size for a CPU" in said and f"from    {source}" in said and "vocabulary 256" in said
    assert cli.main([*command, "--n-layer", "5", "--out", str(tmp_path / "b")]) == 2
    assert f"n_layer is 5, and the model of init_from, {source}, has 2" in capsys.readouterr().err
