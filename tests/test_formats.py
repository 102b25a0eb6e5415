"""Checkpoints of nanoGPT, llm.c and OpenAI: the same weights, and one clear error for a file that is damaged."""

import json
import random
import struct

import pytest
import torch
from foreign_formats import block, crc32c, sealed, table, write_llmc, write_nanogpt, write_openai
from hf_models import hf_gpt2, same_weights, write_folder

from fastgpt2 import GPT
from fastgpt2.gpt2.weights.sstable import masked_crc32c, read_table


def logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx, idx)[0] if isinstance(model, GPT) else model.eval()(idx).logits


# ------------------------------------------------------------------------------------------------------------ nanoGPT


@pytest.mark.parametrize("how", [{}, {"compiled": True}, {"legacy": True}], ids=str)
def test_nanogpts_weights_are_the_same(tmp_path, hf, how):
    path = write_nanogpt(tmp_path, hf, **how)
    for given in (path, path.parent, str(path)):
        model = GPT.from_pretrained(given)
        assert same_weights(model, hf) and model.config.activation == "gelu_erf" and model.config.dropout == 0
    assert model.lm_head.weight is model.transformer.wte.weight


def test_nanogpts_model_without_biases_is_one_with_zero_biases(tmp_path, idx):
    hf = hf_gpt2(activation_function="gelu")
    for name, parameter in hf.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()
    model = GPT.from_pretrained(write_nanogpt(tmp_path, hf, bias=False))
    assert not model.config.bias and model.transformer.h[0].mlp.c_fc.bias is None
    torch.testing.assert_close(logits(model, idx), logits(hf, idx), atol=1e-5, rtol=1e-5)


def test_nanogpts_gelu_is_exact_and_can_be_said_to_be_the_old_one(tmp_path, hf):
    path = write_nanogpt(tmp_path, hf)
    assert GPT.from_pretrained(path, {"activation": "gelu_tanh"}).config.activation == "gelu_tanh"
    with pytest.raises(ValueError, match="activation is 'relu'"):
        GPT.from_pretrained(path, {"activation": "relu"})


def test_a_file_of_positions_and_masks_of_old_is_read(tmp_path, hf):
    path = write_nanogpt(tmp_path, hf)
    content = torch.load(path)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    del content["model_args"]["bias"]  # there was no choice
    torch.save(content, path)
    assert same_weights(GPT.from_pretrained(path), hf)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("model_args"), "is not nanoGPT's ckpt.pt: it has no model and model_args"),
        (lambda c: c["model_args"].pop("n_head"), "model_args has no n_head"),
        (lambda c: c["model_args"].update(n_layer=10**9), "n_layer is 1000000000, but there are"),
        (lambda c: c["model_args"].update(vocab_size=62), r"has shape \(61, 32\), the configuration says \(62, 32\)"),
        (lambda c: c["model_args"].update(n_embd="32"), "n_embd is '32'"),
        (lambda c: c["model_args"].update(n_embd=48), "has shape"),
        (lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.bias"), "'transformer.h.1.mlp.c_fc.bias' is missing"),
        (lambda c: c["model"].update(extra=torch.ones(2)), "'transformer.extra' is unknown|'extra' is unknown"),
        (lambda c: c["model"].update(extra=3), "'extra' is a int, expected a tensor"),
        (lambda c: c["model_args"].update(bias=False), "is not zero, but"),
    ],
)
def test_nanogpts_files_that_do_not_fit_are_named(tmp_path, hf, spoil, message):
    path = write_nanogpt(tmp_path, hf)
    content = torch.load(path)
    spoil(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"ckpt.pt.*({message})"):
        GPT.from_pretrained(path)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"model": {}, "model_args": {}, "config": random.Random(1)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt.pt is not a whole PyTorch file of tensors"):
        GPT.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------------- llm.c


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 128])
def test_llmcs_weights_are_the_same_without_the_padding(tmp_path, dtype, multiple):
    hf = hf_gpt2(dtype=dtype)
    model = GPT.from_pretrained(write_llmc(tmp_path / "gpt2_124M.bin", hf, dtype, multiple))
    assert same_weights(model, hf) and model.config.vocab_size == 61 and model.config.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 1, "is of version 1, read are 3"),
        (2, 25, "a model of its header's sizes has"),
        (4, 2**31 - 1, "a model of its header's sizes has"),
        (4, -1, "has sizes that no model has"),
        (6, 0, "has sizes that no model has"),
        (7, 60, "has sizes that no model has"),
        (5, 5, "n_embd is 32, it must be divisible by n_head"),
    ],
)
def test_llmcs_header_is_checked(tmp_path, hf, place, value, message):
    path = write_llmc(tmp_path / "a.bin", hf)
    content = bytearray(path.read_bytes())
    content[4 * place : 4 * place + 4] = struct.pack("<i", value)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.bin.*{message}"):
        GPT.from_pretrained(path)


# --------------------------------------------------------------------------------------------------------- TensorFlow


@pytest.mark.parametrize("block_entries", [1, 5, 100])
def test_openais_weights_are_the_same(tmp_path, hf, idx, block_entries):
    folder = write_openai(tmp_path / "124M", hf, block_entries)
    for given in (folder, folder / "model.ckpt.index"):
        model = GPT.from_pretrained(given)
        assert same_weights(model, hf)
    torch.testing.assert_close(logits(model, idx), logits(hf, idx), atol=1e-5, rtol=1e-5)


def test_the_checksum_is_crc_32c():
    """32 zeros and 32 ones, from RFC 3720, B.4, masked."""
    for data, crc in ((b"\0" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)):
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        assert masked_crc32c(data) == crc32c(data) == masked


def test_any_flipped_byte_of_the_index_is_seen(tmp_path, hf):
    path = write_openai(tmp_path, hf) / "model.ckpt.index"
    content = path.read_bytes()
    places = random.Random(0).sample(range(len(content)), 40)
    for place in [*places, *range(len(content) - 48, len(content) - 42), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(damaged)
        try:
            model = GPT.from_pretrained(path)
        except ValueError as error:
            assert "model.ckpt" in str(error)
        else:  # in the meta index or the footer's zeros, of which nobody reads anything
            assert same_weights(model, hf)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"model/wte": b"\x08\x01\x28\x05"}, "has 5 bytes, 4 by its shape"),
        ({b"model/wte": b"\x08\x01\x12\x04\x12\x02\x08\x7f\x28\xfc\x03"}, "tensor 'model/wte' ends after its"),
        ({b"model/wte": b"\x08\x01\x20\xff\xff\xff\xff\x7f\x28\x04"}, "tensor 'model/wte' ends after its"),
        ({b"model/wte": b"\x08\x01\x18\x03\x28\x04"}, "model.ckpt.data-00003-of-00001.* is missing"),
        ({b"model/wte": b"\x0b"}, "is damaged"),
        ({b"model/wte": b"\x08" + b"\xff" * 20}, "a number of more than 64 bits"),
        ({b"model/wte": b"\x12\x7f"}, "a field ends after the message"),
        ({b"": b"\x10\x01"}, "big-endian"),
        ({b"model/wte": b"\x3a\x00"}, "in slices"),
        ({b"global_step": b"\x08\x09\x28\x08"}, "n_layer is 2, but there are 1 tensors in all"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, hf, entries, message):
    folder = write_openai(tmp_path, hf)
    data = folder / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    (folder / "model.ckpt.index").write_bytes(table(entries, 5))
    with pytest.raises(ValueError, match=f"model.ckpt.index.*{message}"):
        GPT.from_pretrained(folder)


def test_a_block_that_is_compressed_or_elsewhere_is_refused(tmp_path):
    content = sealed(block({b"a": b"b"}), compression=1)
    for handle, message in ((bytes([0, len(content) - 5]), "compressed"), (bytes([0, 120]), "no block of 120 bytes")):
        (tmp_path / "x.index").write_bytes(content + (handle * 2).ljust(40, b"\0") + table({}, 1)[-8:])
        with pytest.raises(ValueError, match=f"x.index is damaged: .*{message}"):
            read_table(tmp_path / "x.index")


def test_what_a_folder_of_openais_lacks_is_named(tmp_path, hf):
    folder = write_openai(tmp_path, hf)
    (folder / "model-2.index").write_bytes(b"")
    with pytest.raises(ValueError, match="holds several checkpoints: give one of .*model-2.index, .*model.ckpt.index"):
        GPT.from_pretrained(folder)
    (folder / "hparams.json").write_text("[")
    with pytest.raises(ValueError, match="hparams.json is not JSON"):
        GPT.from_pretrained(folder / "model.ckpt.index")
    (folder / "hparams.json").unlink()
    with pytest.raises(FileNotFoundError, match="hparams.json is missing"):
        GPT.from_pretrained(folder / "model.ckpt.index")


# ---------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["ckpt.pt", "a.bin", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_a_file_cut_short_is_named(tmp_path, hf, name, keep):
    write_nanogpt(tmp_path / "nanogpt", hf)
    write_llmc(tmp_path / "a.bin", hf)
    write_openai(tmp_path / "openai", hf)
    (path,) = tmp_path.rglob(name)
    given = path.with_name("model.ckpt.index") if name.startswith("model") else path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{path.name.split('.data')[0]}.*cut short"):
        GPT.from_pretrained(given)


def test_a_huggingface_folder_stays_one_whatever_lies_beside(tmp_path, hf):
    write_folder(tmp_path, hf)
    write_nanogpt(tmp_path, hf_gpt2(seed=1))
    assert same_weights(GPT.from_pretrained(tmp_path), hf)


def test_a_file_in_no_format_is_told_what_there_is(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\0" * 2000)
    with pytest.raises(
        NotADirectoryError, match="files that are read are llm.c's .bin, OpenAI's TensorFlow checkpoint, nanoGPT's ckpt"
    ):
        GPT.from_pretrained(tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(NotADirectoryError, match="pass the folder that holds config.json"):
        GPT.from_pretrained(tmp_path / "weights.bin")
