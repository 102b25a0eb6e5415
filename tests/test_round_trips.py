"""What a HuggingFace folder holds besides weights comes back; a run's own tokenizer stops their `generate`."""

import copy
import json

import pytest
import torch
from hf_models import hf_gpt2, write_folder
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from fastgpt2 import GPT
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, CharTokenizer
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.weights import origin
from fastgpt2.gpt2.weights.checkpoints import find_corruption, save_checkpoint

TEXT = "hello, the hello\n  world's 123 -- héllo\n"
WORDS = BPETokenizer({bytes([b]): b for b in range(256)})


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def their_folder(folder, dtype=torch.float32, **settings):
    """As transformers saves a model with its tokenizer: special tokens first, a chat template, settings of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["[PAD]", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    size = tokenizer.get_vocab_size()
    settings = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **settings}
    model = hf_gpt2(dtype=dtype, **settings, summary_type="mean", use_cache=False, resid_pdrop=0.3).eval()
    model.generation_config = GenerationConfig(eos_token_id=[1, 5], pad_token_id=0, do_sample=True, top_k=7)
    model.save_pretrained(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="[PAD]")
    theirs.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    theirs.save_pretrained(folder)
    (folder / "README.md").write_text("# a model card\n")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_folder_comes_back_byte_for_byte(tmp_path, dtype):
    theirs = their_folder(tmp_path / "theirs", dtype)
    GPT.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    assert files_of(tmp_path / "ours") == files_of(theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["pad_token_id"] == 0 and config["dtype"] == str(dtype).removeprefix("torch.")


def test_weights_and_large_files_stay_behind(tmp_path, monkeypatch):
    theirs = write_folder(tmp_path / "theirs", hf_gpt2(), "pytorch_model.bin.index.json")
    monkeypatch.setattr(origin, "LARGEST_FILE", 100)
    for name in ("tf_model.h5", ".hidden"):
        (theirs / name).write_text("{}")
    (theirs / "small.txt").write_text("x" * 100)
    (theirs / "large.txt").write_text("x" * 101)
    (theirs / "onnx").mkdir()
    GPT.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    assert files_of(tmp_path / "ours").keys() == {"config.json", "model.safetensors", "small.txt"}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_a_dtype_is_said_as_it_was_and_is_that_of_the_weights(tmp_path, key):
    theirs = their_folder(tmp_path / "theirs", torch.bfloat16)
    settings = json.loads((theirs / "config.json").read_text())
    settings.pop("dtype")
    if key is not None:
        settings[key] = "bfloat16"
    (theirs / "config.json").write_text(json.dumps(settings))
    model = GPT.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    model.transformer.wpe.weight.data[0, 0] += 1e-4  # which bfloat16 does not hold
    model.save_pretrained(tmp_path / "trained")
    changed = settings if key is None else {**settings, key: "float32"}
    assert json.loads((tmp_path / "trained" / "config.json").read_text()) == changed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").dtype == torch.float32
    model.half().save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_what_the_model_is_follows_the_model(tmp_path):
    theirs = their_folder(tmp_path / "theirs")
    before = json.loads((theirs / "config.json").read_text())
    model = GPT.from_pretrained(theirs, {"dropout": 0.1, "vocab_multiple": 64})
    model.crop_block_size(16)
    copy.deepcopy(model).save_pretrained(tmp_path / "ours")
    after = json.loads((tmp_path / "ours" / "config.json").read_text())
    ours = {"bias": True, "vocab_multiple": 64, "dropout": 0.1}
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    assert after == {**before, "n_positions": 16, **dropouts, "fastgpt2": ours}
    assert GPT.from_pretrained(tmp_path / "ours").config == model.config


def test_files_that_are_there_already_stay(tmp_path):
    """A tokenizer that its owner saved first, with a token more, is not exchanged for the old one."""
    theirs = their_folder(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "README.md").write_text("mine")
    WORDS.save(tmp_path / "ours")
    before = files_of(tmp_path / "ours")
    GPT.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    after = files_of(tmp_path / "ours")
    assert before.items() <= after.items() and "chat_template.jinja" not in after
    assert after["generation_config.json"] == files_of(theirs)["generation_config.json"]


def test_live_models_keep_their_ends(tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(their_folder(tmp_path / "theirs"))
    again = GPT.from_huggingface(hf).to_huggingface()
    assert again.config.eos_token_id == 1 and again.config.pad_token_id == 0 and again.config.summary_type == "mean"
    assert again.config.resid_pdrop == 0.3
    assert again.generation_config.to_dict() == hf.generation_config.to_dict()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_beside_the_weights_is_kept_and_not_used(tmp_path, content):
    theirs = their_folder(tmp_path / "theirs")
    (theirs / "generation_config.json").write_text(content)
    model = GPT.from_pretrained(theirs)
    assert model.to_huggingface().generation_config.eos_token_id == 1
    model.save_pretrained(tmp_path / "ours")
    assert files_of(tmp_path / "ours") == files_of(theirs)


# -------------------------------------------------------------------------------------------- one's own tokenizer


def stops(folder, token):
    """How many tokens their `generate` writes, in two ways to load it, where `token` is the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.wte.weight.data[token] *= 10
    model.transformer.ln_f.bias.data.copy_(model.transformer.wte.weight[token].detach())
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=token)
    return model.generate(torch.tensor([[97, 98]]), **settings).size(1) - 2


@pytest.mark.parametrize("size", [257, 52_000])
def test_a_runs_end_token_stops_transformers_generate(tmp_path, size):
    pairs = {bytes(divmod(i, 256)): 256 + i for i in range(size - 257)}
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)} | pairs)
    folder = save_checkpoint(tmp_path, 1, tiny(vocab_size=size), tokenizer, {}, keep=1)
    assert find_corruption(folder) is None
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        assert settings["eos_token_id"] == settings["bos_token_id"] == size - 1
    assert stops(folder, size - 1) == 1
    if size == 257:
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == size - 1
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "again")
    left = files_of(folder).keys() - files_of(tmp_path / "again").keys()
    assert left == {"training.pt", "files.json"}
    assert all(files_of(folder)[name] == content for name, content in files_of(tmp_path / "again").items())


def test_ends_that_nobody_named(tmp_path):
    for size, end in ((50257, 50256), (50304, 50256), (52_000, None), (61, None)):
        tiny(vocab_size=size, n_layer=1).save_pretrained(tmp_path / str(size))
        assert json.loads((tmp_path / str(size) / "config.json").read_text())["eos_token_id"] == end
        assert (tmp_path / str(size) / "generation_config.json").exists() == (end is not None)
    save_checkpoint(tmp_path, 1, tiny(vocab_size=4), CharTokenizer("abc"), {}, keep=1)
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["eos_token_id"] is None


def test_another_tokenizer_than_the_folders_ends_its_own_way(tmp_path):
    model = GPT.from_pretrained(their_folder(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours", WORDS)
    found = files_of(tmp_path / "ours")
    assert "chat_template.jinja" not in found and "README.md" in found
    for file in ("config.json", "generation_config.json"):
        assert json.loads(found[file])["eos_token_id"] == WORDS.end_of_text == 256
    assert json.loads(found["generation_config.json"])["top_k"] == 7
    again, tokenizer = load_checkpoint(tmp_path / "ours")
    assert tokenizer == WORDS and again.config == model.config
    # One of several ends of the folder's is left as it was.
    assert origin.ends_with({"eos_token_id": [1, 256]}, 256) == {"eos_token_id": [1, 256]}
