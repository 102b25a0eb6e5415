"""Files that somebody else made: small ones take little time and memory, and none reaches out of its folder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_shards import TOKENS, write_prepared
from tiny_models import tiny

from fastgpt2 import GPT
from fastgpt2.gpt2.data import shards
from fastgpt2.gpt2.weights import huggingface
from fastgpt2.gpt2.weights.checkpoints import load_checkpoint_state
from fastgpt2.gpt2.weights.huggingface import huggingface_state


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def setting(folder, name, value):
    content = json.loads((folder / "config.json").read_text())
    (content["fastgpt2"] if name in content["fastgpt2"] else content)[name] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is made: with these sizes it would take for ever."""
    monkeypatch.setattr(huggingface, "GPT", lambda *args: pytest.fail("a model was made of unchecked sizes"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_layer", 10**9, "n_layer is 1000000000, but there are 28 tensors in all"),
        ("n_embd", 2 * 10**9, r"shape \(8, 16\), the configuration says \(8, 2000000000\)"),
        ("n_positions", 10**15, r"wpe.weight' has shape \(8, 16\), the configuration says \(1000000000000000, 16\)"),
        ("vocab_size", 10**15, r"wte.weight' has shape \(50, 16\)"),
        ("vocab_multiple", 10**9, "vocab_multiple is 1000000000, implemented is up to 65536; override_args takes any"),
    ],
)
def test_sizes_are_compared_with_the_tensors_before_a_model_is_made(folder, no_model, name, value, said):
    setting(folder, name, value)
    with pytest.raises(ValueError, match=said):
        GPT.from_pretrained(folder)


def test_padding_that_is_asked_for_or_small_is_made(folder):
    setting(folder, "vocab_multiple", 64)
    assert GPT.from_pretrained(folder).lm_head.weight.shape == (64, 16)
    setting(folder, "vocab_multiple", 10**9)
    assert GPT.from_pretrained(folder, {"vocab_multiple": 128}).lm_head.weight.shape == (128, 16)


def test_a_tensor_of_fewer_numbers_than_its_shape_is_refused(folder):
    (folder / "model.safetensors").unlink()
    state = {name: value.clone() for name, value in huggingface_state(tiny()).items()}
    torch.save(state, folder / "pytorch_model.bin")
    GPT.from_pretrained(folder)
    state["transformer.wte.weight"] = torch.zeros(1, 1).expand(50, 16)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' has fewer numbers than its shape \(50, 16\)"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../outside.npy", "sub/x.npy", "/etc/x.npy", "..\\outside.npy"])
def test_a_manifest_names_files_beside_it_only(tmp_path, name):
    folder = tmp_path / "shards"
    folder.mkdir()
    manifest = write_prepared(folder)
    np.save(tmp_path / "outside.npy", TOKENS)
    outside = shards.write_shard(tmp_path, "outside.npy", TOKENS)
    dataclasses.replace(manifest, train=(dataclasses.replace(outside, file=name),)).save(folder)
    with pytest.raises(ValueError, match="manifest.json lists .*, expected names of files beside it"):
        shards.open_tokens(folder, "train")


def test_several_arrays_are_no_tokens(tmp_path):
    for split in shards.SPLITS:
        with open(tmp_path / f"{split}.npy", "wb") as file:
            np.savez(file, a=TOKENS)
    with pytest.raises(ValueError, match="train.npy holds several arrays, as .npz files do"):
        shards.open_tokens(tmp_path, "train")


@pytest.mark.parametrize("state", [{"step": 4}, [1]], ids=str)
def test_a_state_without_its_parts_is_named(tmp_path, state):
    torch.save(state, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="training.pt is no state of a run: it has no config, optimizer, padding"):
        load_checkpoint_state(tmp_path)
