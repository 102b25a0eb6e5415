"""Logits of the next token for growing rows of tokens, with the work of one token while rows fit in the cache.

    decoder = Decoder(model, tokens, pads)      # tokens (B, E): row b is tokens[b, pads[b]:end], and end grows
    logits = decoder.logits(end)                # (B, V), of the token that follows tokens[:, :end]

The model reads the rows' last block_size tokens at the first call, and again for every token once a row has more than
block_size tokens, because positions are absolute. Otherwise it reads only the last token. B batch, V vocabulary.
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

# With fewer tokens to generate, packing weights or capturing a graph takes longer than it saves.
WORTH_PREPARING = 16

# The size of a cache that is used by a graph or compiled code is rounded up to a multiple of this number of positions,
# so that they serve texts of other lengths too.
ROOM = 256

Forward = Callable[..., Any]  # takes the arguments of GPT.forward


class Decoder:
    """Computes logits with a KV cache. The model is in eval mode while it computes and in its former mode afterwards.

    tokens: (B, E) int64, which the caller fills. pads: (B,) int64, the number of padding tokens on each row's left.
    cuda_graph: on CUDA, the work of one token is captured once and replayed.
    compile: the work of one token is compiled with torch.compile.
    """

    def __init__(self, model: GPT, tokens: Tensor, pads: Tensor, *, compile: bool = False, cuda_graph: bool = True):
        B, E = tokens.shape
        self.model, self.tokens, self.pads = model, tokens, pads
        self.least_pad = int(pads.min())
        self.compile = compile
        self.cuda_graph = cuda_graph and _has_graphs(model)
        whole = self.cuda_graph or compile  # both need the same shapes for every token
        S = min(model.config.block_size, -(-E // ROOM) * ROOM if whole else E)
        self.end = 0  # the cache holds the keys and values of tokens[:, :end]
        self._read: Forward = self._in_eval_mode(model)
        self._read_one: Forward | None = None  # the model for one token a row, prepared when it is first needed
        self._graph_key = B, S, KVCache.dtype_for(model), compile, model.kernels
        graph = _take_idle(model, self._graph_key) if self.cuda_graph else None
        if graph is None:
            self.cache = KVCache(model, B, S, whole=whole)
        else:
            self.cache, self._read_one = graph.cache, graph

    def release(self) -> None:
        """Ends the use of this decoder and keeps its graph for the model's next text."""
        if isinstance(self._read_one, _Graph):
            _keep_idle(self.model, self._graph_key, self._read_one)
        self._read_one = None

    @torch.no_grad()
    def logits(self, end: int) -> Tensor:
        """Logits (B, V) of the token that follows tokens[:, :end]. They are valid until the next call."""
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
        """Reads the rows' last block_size tokens, shifted to the left so that padding follows them and is not seen."""
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
    """Whether decoding the model with CUDA graphs is possible: on a GPU, with plain parameters, without hooks (a replay
    would not call them) and outside autocast (which frees its casts of weights when it ends)."""
    on_gpu = all(type(p) is nn.Parameter and p.device.type == "cuda" for p in model.parameters())
    return on_gpu and not torch.is_autocast_enabled("cuda") and not any(is_watched(m) for m in model.modules())


def _with_own_strides(read: Forward) -> Forward:
    """Copies the token column before `read`. Its strides depend on the length of the text, and compiled code is
    specialised on strides."""
    return lambda token, cache: read(token.clone(memory_format=torch.contiguous_format), cache=cache)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current device, on which streams, graphs and captures are created."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Graph:
    """The work of one token as a CUDA graph. It is called like the model and replays the captured kernels."""

    def __init__(self, model: Forward, token: Tensor, cache: KVCache):
        self.token = token.clone()
        self.cache = cache
        with _on(token.device):
            self._capture(model, cache)

    def _capture(self, model: Forward, cache: KVCache) -> None:
        lengths = cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and makes allocations that a capture may not make
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


# Graphs of each model's last texts with their caches, kept because a capture takes as long as many tokens. The key
# holds what a graph depends on. The addresses of the weights are stored with each graph; a replay reads their values.
_IDLE: weakref.WeakKeyDictionary[GPT, dict[tuple, tuple[tuple[int, ...], _Graph]]] = weakref.WeakKeyDictionary()
MOST_IDLE = 2  # graphs kept for a model; each holds a cache


def _where(model: GPT) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _take_idle(model: GPT, key: tuple) -> _Graph | None:
    """Removes and returns an unused graph for `key`, or None. Graphs are dropped if the weights' addresses changed."""
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
