"""How HuggingFace names and lays out a GPT-2, for files and for live models: one mapping, checked both ways.

    transformer.wte.weight (V, C)                 ours has rows up to padded_vocab_size
    transformer.h.0.attn.c_attn.weight (C, 3C)    a Conv1D, weights (in, out); ours is a Linear, (out, in): transposed
    transformer.h.0.attn.bias                     the causal mask in old files: a buffer, not a weight, left out
    lm_head.weight                                wte under a second name; absent from many files

The prefix `transformer.` is absent from the hub's own files and from `GPT2Model`. Every name, shape and dtype is
checked before anything is read, so that a model is loaded whole or not at all.
Source: transformers, models/gpt2/modeling_gpt2.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.config import LAYER_NORM_EPS, GPTConfig
from fastgpt2.gpt2.fbgemm import NOT_SAVED, Int8Linear
from fastgpt2.gpt2.model import GPT, unwrap
from fastgpt2.gpt2.ops import Kernels
from fastgpt2.gpt2.stock import PLAIN
from fastgpt2.gpt2.tying import same_values
from fastgpt2.gpt2.weights.origin import GENERATION, Origin, generation_settings, settings_with

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, GPT2Model

TOKEN_TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONV1D = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # with the dot before `attn`: c_attn.bias is a weight
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Our names of the sizes -> theirs, with the names that their configuration takes as well.
SIZES = {
    "block_size": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
SWITCHES = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
OURS_ALONE = ("bias", "vocab_multiple", "dropout")  # no such setting there: kept under "fastgpt2" in config.json
LARGEST_MULTIPLE = 2**16  # of a small vocabulary in a file: a few bytes there shall not take gigabytes here
OVERRIDES = ("dropout", "vocab_multiple", "activation")
# A vocabulary of GPT-2's own size, or that size padded, has <|endoftext|> here.
GPT2_SIZES, GPT2_END = (50257, 50304), 50256
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")  # one function
ERF_GELUS = ("gelu", "gelu_python")


# ------------------------------------------------------------------------------------------------- configurations


def config_from_huggingface(
    settings: Mapping[str, Any], source: str, override_args: Mapping[str, Any] | None = None
) -> GPTConfig:
    """Their configuration, as a dictionary, to ours. What is missing has their default, which is GPT-2 124M's.

    Dropout is 0 unless `override_args` or a model of ours that was saved says otherwise: theirs is 0.1 by default.
    source: where `settings` comes from, for errors.
    Raises ValueError naming the first setting that is not implemented here.
    """
    override_args = dict(override_args or {})
    for name in override_args:
        if name not in OVERRIDES:
            raise ValueError(
                f"override_args has {name!r}, allowed are {', '.join(OVERRIDES)}: the weights decide the rest"
            )

    def refuse(name: str, value: Any, allowed: str) -> None:
        raise ValueError(f"{source}: {name} is {value!r}, implemented is {allowed}")

    if settings.get("model_type") != "gpt2":
        refuse("model_type", settings.get("model_type"), "'gpt2'")
    fields: dict[str, Any] = {}
    for ours, theirs in SIZES.items():
        found = [settings[name] for name in theirs if name in settings]
        if found:
            fields[ours] = found[0]
    fields |= {name: settings[name] for name in SWITCHES if name in settings}
    if settings.get("activation_function") in ERF_GELUS:
        fields["activation"] = "gelu_erf"
    extra = settings.get("fastgpt2", {})
    if not isinstance(extra, Mapping) or not set(extra) <= set(OURS_ALONE):
        refuse("fastgpt2", extra, f"a dictionary of {', '.join(OURS_ALONE)}")
    try:
        config = GPTConfig(**{**fields, **extra})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    most = max(config.vocab_size, LARGEST_MULTIPLE)
    if config.vocab_multiple > most and "vocab_multiple" not in override_args:
        refuse("vocab_multiple", config.vocab_multiple, f"up to {most}; override_args takes any")
    try:
        config = dataclasses.replace(config, **override_args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"override_args: {error}") from None

    implemented: dict[str, tuple] = {
        "activation_function": TANH_GELUS + ERF_GELUS,
        "n_inner": (None, 4 * config.n_embd),
        "layer_norm_epsilon": (LAYER_NORM_EPS,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "quantization_config": (None,),
        "pruned_heads": (None, {}),
    }
    for name, values in implemented.items():
        if settings.get(name, values[0]) not in values:
            refuse(name, settings[name], " or ".join(map(repr, values)))
    return config


def config_to_huggingface(
    config: GPTConfig, dtype: torch.dtype, origin: Origin | None = None, end_of_text: int | None = None
) -> dict[str, Any]:
    """Our configuration to theirs, as the dictionary that config.json holds.

    origin: where the model comes from, whose other settings stay as they were. end_of_text: the token that ends a text;
    default: the origin's, or GPT-2's own where the vocabulary has its size.
    Raises ValueError for a setting of a variant of GPT-2 that they do not have.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*SIZES, *SWITCHES, *OURS_ALONE, "activation") and value != field.default:
            raise ValueError(
                f"{field.name} is {value!r}, and HuggingFace's GPT-2 can only be {field.default!r}: "
                "this model cannot be saved or converted as one"
            )
    own = GPT2_END if end_of_text is None and config.vocab_size in GPT2_SIZES else end_of_text
    made = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs[0]: getattr(config, ours) for ours, theirs in SIZES.items()},
        **{name: getattr(config, name) for name in SWITCHES},
        "n_inner": None,
        "activation_function": (TANH_GELUS if config.activation == "gelu_tanh" else ERF_GELUS)[0],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "bos_token_id": own,
        "eos_token_id": own,
        "fastgpt2": {name: getattr(config, name) for name in OURS_ALONE},
    }
    if origin is None:
        return made
    names = [*SIZES.items(), *((name, (name,)) for name in SWITCHES), *(("dropout", (name,)) for name in DROPOUTS)]
    names += [*((name, ("fastgpt2",)) for name in OURS_ALONE), ("activation", ("activation_function",))]
    return settings_with(origin, made, config, dtype, names, end_of_text)


# -------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint or of a live model, known but not read yet."""

    source: str  # the file, for errors
    name: str  # as it is called there
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a string where PyTorch has no such type
    read: Callable[[], Tensor]


def build(
    config: GPTConfig,
    stored: Iterable[StoredTensor],
    source: str,
    *,
    dtype: torch.dtype | None,
    kernels: str | Kernels = "auto",
) -> GPT:
    """A GPT with copies of these weights, read one by one, in `dtype` or (None) in their own.

    Raises ValueError, before anything is read, for a tensor that is missing, misshapen, of a wrong dtype or unknown.
    """
    stored = list(stored)
    _check_sizes(config, stored, source)
    with torch.device("meta"):
        model = GPT(config, kernels)
    tensors = _checked(config, stored, source)
    state = {}
    for name, meta in model.state_dict().items():
        if name != HEAD:
            state[name] = _read(tensors[name], name, meta.shape, dtype)
    if not config.bias:
        _check_no_biases(tensors, state)
    if HEAD in tensors:
        _check_tied(tensors)
    state[HEAD] = state[TOKEN_TABLE]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _check_sizes(config: GPTConfig, stored: Sequence[StoredTensor], source: str) -> None:
    """Raises ValueError for sizes that the tensors cannot have, before a model of them takes time or memory."""
    if config.n_layer > len(stored):
        raise ValueError(f"{source}: n_layer is {config.n_layer}, but there are {len(stored)} tensors in all")
    tables = {"wte.weight": (config.vocab_size, config.n_embd), "wpe.weight": (config.block_size, config.n_embd)}
    for tensor in stored:
        _check_shape(tensor, tables.get(tensor.name.removeprefix("transformer."), tensor.shape))


def _check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{tensor.source}: tensor {tensor.name!r} has shape {tensor.shape}, the configuration says {expected}"
        )


def _checked(config: GPTConfig, stored: Iterable[StoredTensor], source: str) -> dict[str, StoredTensor]:
    """Our name -> the stored tensor, all names, shapes and dtypes being right."""
    tensors: dict[str, StoredTensor] = {}
    for tensor in stored:
        if tensor.name.endswith(BUFFERS):
            continue
        ours = tensor.name.startswith(("transformer.", "lm_head."))
        name = tensor.name if ours else f"transformer.{tensor.name}"
        if name in tensors:
            raise ValueError(f"{tensor.source}: tensor {tensor.name!r} is there twice, also in {tensors[name].source}")
        tensors[name] = tensor

    expected = huggingface_shapes(config)
    missing = [name for name in expected if name not in tensors and name != HEAD]
    if missing:
        raise ValueError(f"{source}: {_listed(missing)} missing")
    unknown = [t.name for name, t in tensors.items() if name not in expected]
    if unknown:
        raise ValueError(f"{source}: {_listed(unknown)} unknown to a GPT-2 of {config.n_layer} layers")
    for name, tensor in tensors.items():
        _check_shape(tensor, expected[name])
        if tensor.dtype not in FLOATING:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
            raise ValueError(f"{tensor.source}: tensor {tensor.name!r} is {tensor.dtype}, allowed are {allowed}")
    return tensors


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more are" if len(names) > 3 else " are" if len(names) > 1 else " is"
    return f"tensor{'s' * (len(names) > 1)} {', '.join(map(repr, names[:3]))}{more}"


def huggingface_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of their model by name, with its shape there."""
    with torch.device("meta"):
        theirs = GPT(dataclasses.replace(config, bias=True, vocab_multiple=1), "torch")
    return {
        name: tuple(reversed(t.shape)) if name.endswith(CONV1D) else tuple(t.shape)
        for name, t in theirs.state_dict().items()
    }


def _read(tensor: StoredTensor, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    """A copy in our layout; rows of the token table that the checkpoint does not have are 0."""
    value = tensor.read().detach()
    if name.endswith(CONV1D):
        value = value.t()
    copy = torch.empty(shape, dtype=dtype or value.dtype, device=value.device)
    copy[: value.size(0)].copy_(value)
    copy[value.size(0) :].zero_()
    return copy


def _check_tied(tensors: dict[str, StoredTensor]) -> None:
    head, table = tensors[HEAD], tensors[TOKEN_TABLE]
    a, b = head.read(), table.read()
    if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
        raise ValueError(
            f"{head.source}: tensor {head.name!r} differs from {table.name!r}: a head that is not tied to the token "
            "table is not implemented"
        )


def _check_no_biases(tensors: dict[str, StoredTensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in state and name != HEAD and tensor.read().any():
            raise ValueError(
                f"{tensor.source}: tensor {tensor.name!r} is not zero, but config.json says that the model has no "
                'biases: delete "bias" from its entry "fastgpt2" to load them'
            )


def huggingface_state(model: GPT) -> dict[str, Tensor]:
    """Our weights under their names and in their layout, without lm_head.weight. Views: not contiguous, not copies.

    A model with bias=False gets zero biases, which compute the same. Of a parametrised or pruned layer it is the weight
    that it computes with. Hooks are not kept. Raises ValueError for what a GPT-2 has no place for: an adapter, a
    quantised or sharded layer, a head that is not tied, other sizes.
    """
    if len(model.transformer.h) != model.config.n_layer:
        raise ValueError(
            f"transformer.h has {len(model.transformer.h)} blocks, config.n_layer is {model.config.n_layer}"
        )
    state: dict[str, Tensor] = {}
    for name, shape in huggingface_shapes(model.config).items():
        if name == HEAD:
            continue
        path, _, kind = name.rpartition(".")
        layer = _layer(model, path)
        weight = getattr(layer, kind)
        if weight is None:
            state[name] = torch.zeros(shape, dtype=layer.weight.dtype, device=layer.weight.device)
            continue
        if type(weight) not in PLAIN:
            raise ValueError(
                f"{name} is a {type(weight).__name__}, and a checkpoint holds whole, plain tensors: gather a sharded "
                "one (torch.distributed.checkpoint.state_dict.get_model_state_dict), dequantise a quantised one"
            )
        weight = weight.detach()[: shape[0]] if name == TOKEN_TABLE else weight.detach()
        state[name] = weight.t() if name.endswith(CONV1D) else weight
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, which does not fit {model.config}")
    head = _layer(model, HEAD.removesuffix(".weight"))
    table = _layer(model, TOKEN_TABLE.removesuffix(".weight")).weight
    if head.bias is not None or head.weight.shape != table.shape or not same_values(head.weight, table):
        raise ValueError("lm_head is another one than the token table, to which a GPT-2's head is tied: tie_weights()")
    return state


def _layer(model: GPT, path: str) -> Any:
    """The layer of that name, also inside blocks that were compiled one by one."""
    layer: Any = model
    for part in path.split("."):
        layer = getattr(layer, part)
        layer = getattr(layer, "_orig_mod", layer)
    if not isinstance(layer, nn.Linear | nn.Embedding | nn.LayerNorm):
        if isinstance(layer, Int8Linear):
            raise ValueError(NOT_SAVED)
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise ValueError(
            f"{path} is a {kind}, which a GPT-2 has no place for: merge adapters into the layers (peft: "
            "merge_and_unload()) or put one of torch.nn's own layers back"
        )
    if isinstance(layer, nn.LayerNorm) and layer.eps != LAYER_NORM_EPS:
        raise ValueError(f"{path}.eps is {layer.eps}, a GPT-2's is {LAYER_NORM_EPS}")
    return layer


# ---------------------------------------------------------------------------------------------------- live models


def from_huggingface(hf_model: GPT2LMHeadModel | GPT2Model, kernels: str | Kernels = "auto") -> GPT:
    """Our copy of a live model, on its device and in its dtype, in its mode (train or eval); dropout is 0.

    Raises ValueError for a setting or tensor that is not implemented here.
    """
    source = type(hf_model).__name__
    if not hasattr(getattr(hf_model, "config", None), "to_dict"):
        raise TypeError(f"hf_model is a {source}, expected a GPT2LMHeadModel or GPT2Model of transformers")
    config = config_from_huggingface(hf_model.config.to_dict(), f"{source}.config")

    def stored(name: str, t: Tensor) -> StoredTensor:
        return StoredTensor(source, name, tuple(t.shape), t.dtype, lambda: t)

    tensors = [stored(name, t) for name, t in hf_model.state_dict().items()]
    model = build(config, tensors, source, dtype=None, kernels=kernels).train(hf_model.training)
    how = getattr(hf_model, "generation_config", None)
    files = {} if how is None else {GENERATION: how.to_json_string().encode()}
    # What transformers writes itself when it saves a model; releases before 4.56 know dtype as torch_dtype.
    name = "dtype" if "dtype" in hf_model.config.to_dict() else "torch_dtype"
    settings = {"architectures": ["GPT2LMHeadModel"], name: str(model.dtype).removeprefix("torch.")}
    settings |= json.loads(hf_model.config.to_json_string())
    model.origin = Origin(settings, config, model.dtype, files=files)
    return model


def to_huggingface(model: nn.Module) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` with copies of these weights, on their device, in their dtype, in the model's mode."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    gpt = unwrap(model)
    devices = [gpt.device] if gpt.device.type == "cuda" else []
    # Their constructor draws random weights: they are replaced, and the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices), gpt.device:
        hf_model = GPT2LMHeadModel(GPT2Config.from_dict(config_to_huggingface(gpt.config, gpt.dtype, gpt.origin)))
    if how := generation_settings(gpt.origin):
        hf_model.generation_config = GenerationConfig.from_dict(how)
    state = huggingface_state(gpt)
    parameters = dict(hf_model.named_parameters())
    assert parameters.keys() == state.keys(), sorted(parameters.keys() ^ state.keys())
    for name, parameter in parameters.items():
        parameter.data = state[name].clone(memory_format=torch.contiguous_format)
    return hf_model.train(gpt.training)
