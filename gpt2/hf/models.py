"""transformers' GPT2Model and GPT2LMHeadModel in terms of `ops`: embedding, blocks, head and loss.

transformers' own forward computes calls with other inputs or outputs (hidden states, embeddings as inputs, an encoder)
and models in which a block or its attention has hooks. Embedding, mask, attention and the sums between blocks are then
transformers', and only LayerNorm and MLP are computed by `Block`. `hf.report` says so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf import visible
from fastgpt2.gpt2.hf.attention import NAME
from fastgpt2.gpt2.hf.blocks import Block, Context
from fastgpt2.gpt2.hf.stand_in import StandIn, is_of_transformers, is_untouched
from fastgpt2.gpt2.inputs import check_range
from fastgpt2.gpt2.ops import IGNORED_TARGET, Kernels, Stream
from fastgpt2.gpt2.stock import is_stock

# Arguments with which transformers' own forward computes a call.
NOT_OURS = (
    "token_type_ids",
    "inputs_embeds",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "output_hidden_states",
)


def why_not(model: Any) -> str | None:
    """The reason for which transformers' forward computes every call of a GPT2Model; None if `Model.compute` can."""
    from transformers import AttentionInterface

    config = model.config
    if config.add_cross_attention or not getattr(config, "is_causal", True):
        return "the config asks for cross-attention, or for attention that is not causal"
    name = config._attn_implementation
    attention = AttentionInterface._global_mapping.get(name)
    if name != NAME and attention is not None and not is_of_transformers(attention):
        return f"attn_implementation={name!r} is neither transformers' nor ours"
    for i, block in enumerate(model.h):
        if not isinstance(block, Block) or not is_untouched(block, type(block)):
            return f"h.{i} is replaced or has hooks"
        if not is_untouched(block.attn, model.theirs.Attention):
            return f"h.{i}.attn is replaced or has hooks"
        if not getattr(block.attn, "is_causal", True):
            return f"h.{i}.attn.is_causal is False"
    return None


class Model(StandIn):
    config: Any
    h: Any
    ln_f: Any
    wte: Any
    wpe: Any
    drop: Any
    gradient_checkpointing: bool

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if not self.serves(call) or why_not(self) is not None:
            return super().forward(*args, **kwargs)
        idx, cached = call["input_ids"], self.cache_name
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = self.config.use_cache if call.get("use_cache") is None else call["use_cache"]
        use_cache = use_cache and not checkpointed
        cache = None if checkpointed else call.get(cached)
        if use_cache and cache is None:
            cache = _new_cache(self.config)
        kernels = ops.kernels_for(self._fastgpt2.kernels, idx.device)
        past = 0 if cache is None else cache.get_seq_length()
        context = self.context(idx, call, cache, past, kernels)
        positions = call.get("position_ids")
        if positions is None and cache is not None and not (isinstance(past, int) and past == 0):
            positions = torch.arange(idx.size(1), device=idx.device) + past
        if kernels.embedding == "triton":  # its kernel returns NaN for indices for which PyTorch raises
            self.check(idx, call.get("position_ids"), past)
        x = self.embed(idx, None if positions is None else positions.expand(idx.shape), kernels)
        stream = Stream(x)
        for block in self.h:
            stream = block.checkpointed(stream, context) if checkpointed else block.extend(stream, context)
        x = ops.add_layer_norm(stream, self.ln_f, kernels)[1]
        return _model_output(x, cached, cache if use_cache else None)

    def check(self, idx: Tensor, positions: Tensor | None, past: int | Tensor) -> None:
        """Raises ValueError for tokens and positions outside the tables; on a GPU this is a device-side assertion."""
        if is_stock(self.wte, nn.Embedding):
            check_range("input_ids", idx, "the vocabulary", self.wte.weight.size(0))
        if not is_stock(self.wpe, nn.Embedding):
            return
        n, T = self.wpe.weight.size(0), idx.size(1)
        if positions is not None:
            check_range("position_ids", positions, "n_positions", n)
        elif isinstance(past, int) and past + T > n:
            raise ValueError(f"input_ids has {T} tokens a row and the cache {past} before them, n_positions is {n}")

    @property
    def cache_name(self) -> str:
        return "cache" if "cache" in self.names else "past_key_values"

    def serves(self, call: dict[str, Any]) -> bool:
        """Whether `compute` supports a call's arguments."""
        idx, mask = call.get("input_ids"), call.get("attention_mask")
        if idx is None or idx.dim() != 2 or any(call.get(name) is not None for name in NOT_OURS[:4]):
            return False
        if any(call.get(name, getattr(self.config, name, False)) for name in NOT_OURS[4:]):
            return False
        if call.get("return_dict", self.config.return_dict) is False or call.get("is_causal") is False:
            return False
        if self.cache_name == "cache" and call.get("past_key_values") is not None:
            return False  # deprecated: transformers renames it
        cache = call.get(self.cache_name)
        if mask is None:
            return True
        if mask.dim() == 4:
            return mask.dtype == torch.bool and (cache is not None or mask.size(3) == idx.size(1))
        return mask.dim() == 2 and (cache is not None or mask.shape == idx.shape)

    def context(self, idx: Tensor, call: dict[str, Any], cache: Any, past: int | Tensor, kernels: Kernels) -> Context:
        """The context of a call, with the mask of its attention. Raises ValueError for padding between real tokens of a
        row if Triton computes attention."""
        (B, T), positions, mask = idx.shape, call.get("position_ids"), call.get("attention_mask")
        S = T if cache is None else cache.get_mask_sizes(T, 0)[0]
        by_torch = kernels.attention == "torch"
        alone = cache is None or (isinstance(past, int) and past == 0)
        cu_seqlens = call.get("cu_seq_lens_q")
        if alone and cu_seqlens is not None:
            return Context(kernels, cache, True, ops.document_mask(cu_seqlens.to(torch.int32), B, T, kernels))
        if cache is None and mask is None:  # as transformers, which sees restarts where there is no cache
            restarts = None if positions is None else positions.diff(dim=1) != 1
            if restarts is not None and (torch.compiler.is_compiling() or bool(restarts.any())):
                documents = visible.documents(visible.starts_of_documents(restarts.expand(B, -1))).flatten()
                return Context(kernels, documents=ops.document_mask(documents, B, T, kernels))
        try:
            if mask is not None and mask.dim() == 4:
                seen = mask if by_torch else visible.from_booleans(mask, past)
            else:
                real = None if mask is None else F.pad(mask.bool(), (0, max(0, S - mask.size(1))))
                seen = visible.encode(B, T, S, past, real, idx.device, by_torch)
        except ValueError as error:
            raise ValueError(
                f"{error}. hf.accelerate(model, Kernels(attention='torch', ...)) computes such calls by PyTorch"
            ) from None
        if not alone and T == 1 and not by_torch and not torch.is_grad_enabled():
            ranges = visible.ranges(torch.full((1,), S, device=idx.device), None) if seen is None else seen
            return Context(kernels, cache, alone, None, seen, *visible.lengths_and_starts(ranges, B))
        if seen is None or not alone:
            return Context(kernels, cache, alone, None, seen)
        if seen.dtype == torch.int32:
            return Context(kernels, cache, alone, ops.document_mask(seen.flatten(), B, T, kernels))
        return Context(kernels, cache, alone, seen[..., :T])

    def embed(self, idx: Tensor, positions: Tensor | None, kernels: Kernels) -> Tensor:
        """idx (B, T) -> (B, T, C), with dropout."""
        if is_stock(self.drop, nn.Dropout):
            dropout_p = self.drop.p if self.drop.training else 0.0
            return ops.embedding(idx, self.wte, self.wpe, positions, dropout_p, kernels)
        return self.drop(ops.embedding(idx, self.wte, self.wpe, positions, 0.0, kernels))


class LMHeadModel(StandIn):
    config: Any
    transformer: Any
    lm_head: Any

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what GPT2LMHeadModel's forward does, except that a training step may be `without_logits`."""
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if call.get("labels") is None or not self.without_logits(call):
            return super().forward(*args, **kwargs)
        labels, shifted = call.pop("labels"), call.pop("shift_labels", None)
        items, ignored = call.pop("num_items_in_batch", None), call.pop("ignore_index", IGNORED_TARGET)
        call.pop("logits_to_keep", None)
        outputs = self.transformer(**call)
        targets = F.pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
        x = outputs.last_hidden_state
        if targets.numel() != x.shape[:-1].numel():
            raise ValueError(f"labels is of shape {tuple(targets.shape)}, allowed is {tuple(x.shape[:-1])}")
        targets = targets.to(x.device).view(x.shape[:-1])
        left_out = targets == ignored
        check_range("labels", targets.masked_fill(left_out, 0), "the vocabulary", self.lm_head.weight.size(0))
        loss = ops.loss_without_logits(x, self.lm_head, targets, ignored)
        if items is None:
            items = (~left_out).sum()  # where there are none, the loss is NaN, as theirs
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return _head_output(loss, outputs)

    def without_logits(self, call: dict[str, Any]) -> bool:
        """Whether the loss is computed without logits: in a training step over all positions, with
        training_logits=False, Triton's loss, a stock head and transformers' own loss function."""
        keep = call.get("logits_to_keep")
        return (
            not self._fastgpt2.training_logits
            and self.training
            and torch.is_grad_enabled()
            and (keep is None or (isinstance(keep, int) and keep == 0))
            and call.get("return_dict", self.config.return_dict) is not False
            and why_logits(self, ops.kernels_for(self._fastgpt2.kernels, call["labels"].device)) is None
        )


def why_logits(model: Any, kernels: Kernels) -> str | None:
    """The reason for which a training step computes its loss from logits; None if it does not."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    if model._fastgpt2.training_logits:
        return "training_logits=True: logits are in every output"
    if kernels.cross_entropy != "triton":
        return "PyTorch's loss needs logits"
    if not is_stock(model.lm_head, nn.Linear) or model.lm_head.bias is not None:
        return "lm_head is replaced or has hooks or a bias"
    if model.loss_function is not LOSS_MAPPING["ForCausalLM"]:
        return "loss_function is another than transformers' own"
    return None


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _model_output(x: Tensor, cached: str, cache: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, **{cached: cache})


def _head_output(loss: Tensor, outputs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    return CausalLMOutputWithCrossAttentions(loss=loss, logits=None, **kept)
