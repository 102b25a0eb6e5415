"""Checkpoints in: every format, and a clear error and no model for everything that is not whole."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from hf_models import FORMATS, TINY, hf_gpt2, same_weights, state_of, write_folder, write_weights

from fastgpt2 import GPT
from fastgpt2.gpt2.weights import huggingface

# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize(
    "layout", [dict(), dict(prefix=False, head=False), dict(buffers=True), dict(prefix=False)], ids=str
)
def test_every_format_and_layout_gives_huggingface_s_logits(tmp_path, hf, idx, file, layout):
    model = GPT.from_pretrained(write_folder(tmp_path, hf, file, **layout))
    assert same_weights(model, hf)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training and all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-5)


def test_what_transformers_writes_is_read(tmp_path, hf, idx):
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("one", "shards"):
        assert same_weights(GPT.from_pretrained(str(tmp_path / folder)), hf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_load_as_float32_whatever_the_file_holds(tmp_path, dtype, file):
    hf = hf_gpt2(dtype=dtype)
    model = GPT.from_pretrained(write_folder(tmp_path, hf, file))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and same_weights(model, hf)


def test_the_weights_are_copies_not_views_of_the_file(tmp_path, hf):
    for file in ("model.safetensors", "pytorch_model.bin"):
        folder = write_folder(tmp_path / file, hf, file)
        model = GPT.from_pretrained(folder)
        (folder / file).write_bytes(bytes((folder / file).stat().st_size))
        assert same_weights(model, hf)


def test_settings_of_the_configuration_are_honoured(tmp_path, idx):
    hf = hf_gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, scale_attn_weights=False).eval()
    model = GPT.from_pretrained(write_folder(tmp_path, hf))
    assert model.config.scale_attn_by_inverse_layer_idx and model.config.reorder_and_upcast_attn
    assert not model.config.scale_attn_weights
    torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-5)


def test_the_other_names_of_the_sizes_are_read(tmp_path, hf):
    folder = write_folder(tmp_path, hf)
    settings = json.loads((folder / "config.json").read_text())
    for theirs in huggingface.SIZES.values():
        settings[theirs[-1]] = settings.pop(theirs[0])
    (folder / "config.json").write_text(json.dumps(settings))
    assert GPT.from_pretrained(folder).config.n_head == TINY["n_head"]


def test_dropout_is_zero_unless_it_is_asked_for(tmp_path):
    folder = write_folder(tmp_path, hf_gpt2(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1))
    assert GPT.from_pretrained(folder).config.dropout == 0.0
    model = GPT.from_pretrained(folder, dict(dropout=0.25))
    assert model.config.dropout == model.transformer.h[1].attn.dropout == 0.25


def test_the_vocabulary_can_be_padded_on_the_way_in(tmp_path, hf, idx):
    model = GPT.from_pretrained(write_folder(tmp_path, hf), dict(vocab_multiple=64))
    assert model.transformer.wte.weight.shape[0] == 64 and not model.transformer.wte.weight[61:].any()
    assert same_weights(model, hf)
    torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("override", [dict(n_layer=3), dict(bias=False), dict(dropout=0.1, block_size=8)])
def test_other_overrides_are_refused_by_name(tmp_path, hf, override):
    name = [k for k in override if k != "dropout"][0]
    with pytest.raises(ValueError, match=f"override_args has '{name}', allowed are dropout"):
        GPT.from_pretrained(write_folder(tmp_path, hf), override)


def test_reading_needs_no_transformers_and_uses_the_cache(tmp_path, hf):
    """One process without transformers and without a network: a folder, and a model that the hub's cache holds."""
    folder = write_folder(tmp_path / "folder", hf)
    for repository in ("models--distilbert--distilgpt2", "models--someone--else"):
        cache = tmp_path / "hub" / repository
        write_folder(cache / "snapshots" / "abc", hf, prefix=False, head=False)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
    code = f"""
import sys
sys.modules["transformers"] = None
from fastgpt2 import GPT
for name in ({str(folder)!r}, "distilgpt2", "distilbert/distilgpt2", "someone/else"):
    print(GPT.from_pretrained(name).config.n_embd)
try:
    GPT.from_pretrained("gpt2-xl")
except OSError as error:
    print(error)
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *widths, error = run.stdout.splitlines()
    assert widths == ["32"] * 4
    assert "'gpt2-xl' is no local folder and could not be downloaded" in error and "path/to/folder" in error


@pytest.fixture
def hub(monkeypatch, tmp_path, hf):
    """A hub that holds what the test puts there: repository -> folder; `hub.asked` lists (repository, patterns)."""
    import huggingface_hub

    class Hub(dict):
        asked: list = []

    hub = Hub()
    hub.asked = []

    def snapshot_download(repository, allow_patterns):
        hub.asked.append((repository, allow_patterns))
        if repository not in hub:
            raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError")
        return str(hub[repository])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_the_hub_is_asked_for_safetensors_first(hub, tmp_path, hf):
    hub["gpt2"] = write_folder(tmp_path / "cache", hf)
    assert same_weights(GPT.from_pretrained("gpt2"), hf)
    ((repository, patterns),) = hub.asked
    assert repository == "gpt2" and "config.json" in patterns and "model-*.safetensors" in patterns
    assert not any("bin" in p for p in patterns)


def test_the_hub_is_asked_for_pickles_where_there_are_no_safetensors(hub, tmp_path, hf):
    hub["some/model"] = write_folder(tmp_path / "cache", hf, "pytorch_model.bin")
    assert same_weights(GPT.from_pretrained("some/model"), hf)
    assert "pytorch_model-*.bin" in hub.asked[1][1]


def test_a_short_name_is_looked_up_under_its_full_one_too(hub, tmp_path, hf):
    (tmp_path / "partial").mkdir()
    hub["gpt2"] = tmp_path / "partial"  # a cache that only has the tokenizer
    hub["openai-community/gpt2"] = write_folder(tmp_path / "cache", hf)
    assert same_weights(GPT.from_pretrained("gpt2"), hf)


def test_a_source_folder_called_gpt2_does_not_hide_the_hub_s(hub, tmp_path, hf):
    (tmp_path / "gpt2").mkdir()
    hub["gpt2"] = write_folder(tmp_path / "cache", hf)
    assert same_weights(GPT.from_pretrained("gpt2"), hf)
    write_folder(tmp_path / "gpt2", hf_gpt2(seed=5))
    assert not same_weights(GPT.from_pretrained("gpt2"), hf)


def test_a_failed_download_is_the_only_error_of_a_traceback(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: 1 / 0)
    with pytest.raises(OSError, match="could not be downloaded") as error:
        GPT.from_pretrained("gpt2")
    text = "".join(traceback.format_exception(error.value))
    assert text.count("Traceback") == 1 and "ZeroDivisionError: " in text.splitlines()[-1].replace("(", "")


def test_a_failed_download_says_so_and_how_to_do_without(hub):
    with pytest.raises(OSError, match=r"'gpt2' is no local folder.*ConnectError.*pass a local folder with config.json"):
        GPT.from_pretrained("gpt2")


# ------------------------------------------------------------------------------------------- what must be refused


REFUSED = {
    "activation_function": "relu",
    "n_inner": 100,
    "layer_norm_epsilon": 1e-6,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "model_type": "gpt_neo",
    "quantization_config": {"bits": 4},
    "n_layer": 0,
    "n_head": 5,
    "vocab_size": "61",
    "fastgpt2": {"rotary": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_implemented_is_refused_by_name(tmp_path, hf, name):
    folder = write_folder(tmp_path, hf)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, name: REFUSED[name]}))
    with pytest.raises(ValueError, match=f"config.json: .*{name.removeprefix('n_')}") as error:
        GPT.from_pretrained(folder)
    assert str(REFUSED[name]) in str(error.value)


@pytest.mark.parametrize("name", huggingface.TANH_GELUS)
def test_the_names_of_the_tanh_gelu_mean_one_function(name):
    from transformers.activations import get_activation

    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    ours = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(get_activation(name)(x), ours, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98, 0.9999])
def test_a_truncated_file_is_named(tmp_path, hf, file, keep):
    folder = write_folder(tmp_path, hf, file)
    (weights,) = [p for p in folder.iterdir() if p.name != "config.json"]
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=f"{weights.name} is not a whole .*cut short"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["", '{"model_type": "gp', "[1, 2]"])
def test_a_truncated_json_file_is_named(tmp_path, hf, file, text):
    folder = write_folder(tmp_path, hf, "model.safetensors.index.json")
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} (is not JSON|holds a list)"):
        GPT.from_pretrained(folder)


def drop(state):
    del state["transformer.h.1.ln_2.bias"]


def drop_many(state):
    for name in [n for n in state if ".h.1." in n]:
        del state[name]


def add(state):
    state["transformer.h.2.ln_1.weight"] = torch.ones(32)


def add_biases(state):
    state["transformer.h.0.attn.rotary.bias"] = torch.ones(32)


def misshape(state):
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:20]


def transpose(state):
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].t()


def flatten(state):
    state["transformer.h.0.ln_1.weight"] = state["transformer.h.0.ln_1.weight"].view(1, 32)


def quantise(state):
    state["transformer.h.0.attn.c_attn.weight"] = state["transformer.h.0.attn.c_attn.weight"].to(torch.int8)


def quantise_to_float8(state):
    state["transformer.h.0.attn.c_attn.weight"] = state["transformer.h.0.attn.c_attn.weight"].to(torch.float8_e4m3fn)


def untie(state):
    state["lm_head.weight"] = state["lm_head.weight"] + 1e-3


def duplicate(state):
    state["h.0.ln_1.weight"] = state["transformer.h.0.ln_1.weight"].clone()


BROKEN = {
    drop: r"tensor 'transformer.h.1.ln_2.bias' is missing",
    drop_many: r"tensors 'transformer.h.1.ln_1.weight', .* and 9 more are missing",
    add: r"tensor 'transformer.h.2.ln_1.weight' is unknown to a GPT-2 of 2 layers",
    add_biases: r"tensor 'transformer.h.0.attn.rotary.bias' is unknown",
    misshape: r"tensor 'transformer.wpe.weight' has shape \(20, 32\), the configuration says \(24, 32\)",
    transpose: r"tensor 'transformer.h.0.mlp.c_fc.weight' has shape \(128, 32\)",
    flatten: r"tensor 'transformer.h.0.ln_1.weight' has shape \(1, 32\)",
    quantise: r"tensor 'transformer.h.0.attn.c_attn.weight' is .*(int8|I8), allowed are float32",
    quantise_to_float8: r"tensor 'transformer.h.0.attn.c_attn.weight' is .*(float8|F8)",
    untie: r"tensor 'lm_head.weight' differs from 'transformer.wte.weight'",
    duplicate: r"tensor '(transformer\.)?h.0.ln_1.weight' is there twice",
}


@pytest.mark.parametrize("file", FORMATS[:4])
@pytest.mark.parametrize("spoil", BROKEN, ids=lambda f: f.__name__)
def test_a_wrong_tensor_is_named_with_its_file(tmp_path, hf, spoil, file):
    folder = write_folder(tmp_path, hf, file)
    state = state_of(hf)
    spoil(state)
    write_weights(folder, state, file)
    with pytest.raises(ValueError, match=BROKEN[spoil]) as error:
        GPT.from_pretrained(folder)
    stem = file.split(".")[0]
    assert f"{tmp_path}/{stem}" in str(error.value)


def test_nothing_is_read_before_everything_is_checked(hf):
    tensors = [
        huggingface.StoredTensor("file", k, tuple(t.shape), t.dtype, lambda: pytest.fail("read"))
        for k, t in state_of(hf).items()
    ]
    config = huggingface.config_from_huggingface(hf.config.to_dict(), "config.json")
    with pytest.raises(ValueError, match="missing"):
        huggingface.build(config, tensors[:-2], "file", dtype=None)


def test_shards_are_checked_against_their_index(tmp_path, hf):
    index = "model.safetensors.index.json"
    folder = write_folder(tmp_path, hf, index)
    shards = sorted(folder.glob("*.safetensors"))
    weight_map = json.loads((folder / index).read_text())["weight_map"]

    def with_map(changed):
        (folder / index).write_text(json.dumps({"weight_map": changed}))
        return folder

    name = next(n for n, shard in weight_map.items() if shard == shards[0].name)
    with pytest.raises(ValueError, match=f"{shards[1].name}: tensor '{name}' is missing, {index} says"):
        GPT.from_pretrained(with_map({**weight_map, name: shards[1].name}))
    with pytest.raises(FileNotFoundError, match=f"{index} names the shard 'gone.safetensors'"):
        GPT.from_pretrained(with_map({**weight_map, name: "gone.safetensors"}))
    (tmp_path.parent / "outside.safetensors").write_bytes(shards[0].read_bytes())
    with pytest.raises(FileNotFoundError, match="names the shard '../outside.safetensors'"):
        GPT.from_pretrained(with_map({**weight_map, name: "../outside.safetensors"}))
    with pytest.raises(ValueError, match=f"{index} has no weight_map"):
        GPT.from_pretrained(with_map(["a"]))
    shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=shards[2].name):
        GPT.from_pretrained(with_map(weight_map))


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_a_pickle_may_hold_tensors_only(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path, hf)
    (folder / "model.safetensors").unlink()
    for content, message in [
        ({"wte.weight": Exploit()}, "is not a whole PyTorch file of tensors"),
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"model": {"wte.weight": torch.ones(2)}}, "'model' is a dict, expected a tensor"),
    ]:
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"pytorch_model.bin.*{message}"):
            GPT.from_pretrained(folder)
    assert not Path("exploited").exists()


def test_a_folder_that_is_no_checkpoint_says_what_was_looked_for(tmp_path, hf):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="no config.json and no weights: looked for config.json and one of model"
    ):
        GPT.from_pretrained(tmp_path / "empty")
    folder = write_folder(tmp_path / "no weights", hf)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="it has no weights: .*pytorch_model.bin"):
        GPT.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="model.safetensors is a file, pass the folder"):
        GPT.from_pretrained(tmp_path / "model.safetensors")
    for nowhere in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c", ""):
        with pytest.raises((FileNotFoundError, ValueError)):
            GPT.from_pretrained(nowhere)
