"""What comes next in growing rows of tokens, at the cost of one token where the cache reaches.

    decoder = Decoder(model, tokens, pads)      # tokens (B, E): row b is tokens[b, pads[b]:end], and end grows
    logits = decoder.logits(end)                # (B, V), what follows tokens[:, :end]

The rows' last block_size tokens are read when they are new and whenever a row has more than block_size of them, because
positions are absolute: there every token is a whole pass. Otherwise only the last token is. B batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.evaluation.evaluate import evaluating
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.packed import can_pack, packed
from fastgpt2.gpt2.stock import is_watched

# With fewer tokens to come, preparing (laying weights out, capturing a graph) does not pay.
WORTH_PREPARING = 16

# Positions that a cache under a graph or in compiled code is rounded up to, so that these serve other lengths too.
ROOM = 256

Forward = Callable[..., Any]  # called as GPT.forward


class Decoder:
    """The model is in eval mode while it computes and is left in the mode it was in.

    cuda_graph: on CUDA, the work of one token is captured once and replayed. compile: that work goes through
    torch.compile.
    """

    def __init__(self, model: GPT, tokens: Tensor, pads: Tensor, *, compile: bool = False, cuda_graph: bool = True):
        B, E = tokens.shape
        self.model, self.tokens, self.pads = model, tokens, pads
        self.least_pad = int(pads.min())
        self.compile = compile
        self.cuda_graph = cuda_graph and _has_graphs(model)
        whole = self.cuda_graph or compile  # every token is the same work
        S = min(model.config.block_size, -(-E // ROOM) * ROOM if whole else E)
        self.end = 0  # the cache holds tokens[:, :end]
        self._read: Forward = self._in_eval_mode(model)
        self._read_one: Forward | None = None  # the same for one token a row, prepared when it is first needed
        self._graph_key = B, S, KVCache.dtype_for(model), compile, model.kernels
        graph = _take_idle(model, self._graph_key) if self.cuda_graph else None
        if graph is None:
            self.cache = KVCache(model, B, S, whole=whole)
        else:
            self.cache, self._read_one = graph.cache, graph

    def release(self) -> None:
        """The decoder is not used any more: its graph may serve the model's next text."""
        if isinstance(self._read_one, _Graph):
            _keep_idle(self.model, self._graph_key, self._read_one)
        self._read_one = None

    @torch.no_grad()
    def logits(self, end: int) -> Tensor:
        """(B, V), valid until the next call."""
        many = self.tokens.size(1) - end >= WORTH_PREPARING
        if not self.end and many and not self.compile and self.model.kernels.mlp == "torch" and can_pack(self.model):
            self._read = self._in_eval_mode(packed(self.model))
        grown = self.end and end == self.end + 1 and end - self.least_pad <= self.model.config.block_size
        logits = self._one_token(end, many) if grown else self._window(end)
        self.end = end
        return logits[:, -1]

    def _in_eval_mode(self, forward: Forward) -> Forward:
        def read(idx: Tensor, cache: KVCache) -> Any:
            with evaluating(self.model):
                return forward(idx, cache=cache)

        return read

    def _window(self, end: int) -> Tensor:
        """Reads the rows' last block_size tokens, moved to begin together: the padding is then after them, unseen."""
        first = (end - self.model.config.block_size - self.pads).clamp(min=0) + self.pads  # (B,)
        W = min(end - self.least_pad, self.model.config.block_size)
        columns = first[:, None] + torch.arange(W, device=first.device)
        self.cache.start(end - first)
        return self._read(self.tokens.gather(1, columns.clamp(max=end - 1)), cache=self.cache)[0]

    def _one_token(self, end: int, many: bool) -> Tensor:
        token = self.tokens[:, end - 1 : end]
        if self._read_one is None:
            self._read_one = self._read
            if self.compile:
                self._read_one = _with_own_strides(self._in_eval_mode(torch.compile(self.model, dynamic=False)))
            if self.cuda_graph and many:
                try:
                    self._read_one = _Graph(self._read_one, token, self.cache)
                except RuntimeError as error:
                    warnings.warn(f"the decode step was not captured as a CUDA graph: {error}", stacklevel=2)
        return self._read_one(token, cache=self.cache)[0]


def _has_graphs(model: GPT) -> bool:
    """Not inside autocast, which frees the weights that it has cast when it ends, nor where weights are sharded, nor
    with hooks, which a replay would not call."""
    on_gpu = all(type(p) is nn.Parameter and p.device.type == "cuda" for p in model.parameters())
    return on_gpu and not torch.is_autocast_enabled("cuda") and not any(is_watched(m) for m in model.modules())


def _with_own_strides(read: Forward) -> Forward:
    """A column's strides depend on how long its text may become, and compiled code holds for one of them."""
    return lambda token, cache: read(token.clone(memory_format=torch.contiguous_format), cache=cache)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Streams, graphs and captures are of the current device: makes it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Graph:
    """One token's work as a CUDA graph: called like the model, it replays the captured kernels."""

    def __init__(self, model: Forward, token: Tensor, cache: KVCache):
        self.token = token.clone()
        self.cache = cache
        with _on(token.device):
            self._capture(model, cache)

    def _capture(self, model: Forward, cache: KVCache) -> None:
        lengths = cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and allocates, which a capture may not
            for _ in range(2):
                cache.lengths.copy_(lengths)
                model(self.token, cache=cache)
        torch.cuda.current_stream().wait_stream(side)
        cache.lengths.copy_(lengths)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = model(self.token, cache=cache)

    def __call__(self, token: Tensor, cache: KVCache):
        self.token.copy_(token)
        with _on(token.device):
            self.graph.replay()
        return self.out


# Graphs of each model's last texts, with their caches, by what they hold for: capturing takes as long as many tokens.
# Beside each, where the weights were, whose values a graph reads anew.
_IDLE: weakref.WeakKeyDictionary[GPT, dict[tuple, tuple[tuple[int, ...], _Graph]]] = weakref.WeakKeyDictionary()
MOST_IDLE = 2  # a model's: each holds a cache


def _where(model: GPT) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _take_idle(model: GPT, key: tuple) -> _Graph | None:
    """A graph for `key` that nobody uses; graphs of weights that are elsewhere now are forgotten."""
    where = _where(model)
    idle = {k: entry for k, entry in _IDLE.pop(model, {}).items() if entry[0] == where}
    _, graph = idle.pop(key, (None, None))
    if idle:
        _IDLE[model] = idle
    return graph


def _keep_idle(model: GPT, key: tuple, graph: _Graph) -> None:
    idle = _IDLE.setdefault(model, {})
    idle.pop(key, None)
    idle[key] = _where(model), graph
    while len(idle) > MOST_IDLE:
        del idle[next(iter(idle))]
