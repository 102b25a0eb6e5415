"""Which keys each query sees, in the form that our kernels take, as a tensor that goes where transformers' masks go.

Every query sees one run of keys that ends with itself. None: it begins with the first key. Otherwise one of

    documents   int32 (1, 1, 1, B*T + 1)    T queries against the same T tokens: where the run of each of the B*T
                                            flattened tokens begins, and B*T. Equal neighbours are one document.
    ranges      int64 (B, 1, T, 1 or 2)     T queries behind tokens in a cache: the run's end, and its beginning where
                                            it may be another than 0

Both have four dimensions, as a mask that transformers leaves as it is, and sizes that follow from shapes alone, so that
nothing waits for the device and equal batches are equal launches. Padding is a document of its own, left or right:
real tokens see what they should, and padding sees padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.gpt2 import ops

HOLES = (
    "attention_mask has padding between real tokens of a row, allowed is padding at its ends "
    "(text to be continued is padded on the left)"
)


def starts_of_padding(real: Tensor) -> Tensor:
    """real (B, T) bool, in one run a row -> where each token's run of equal values begins, (B, T)."""
    return starts_of_documents(real[:, 1:] != real[:, :-1])


def starts_of_positions(position_ids: Tensor) -> Tensor:
    """position_ids (B, T), which restart where a document begins -> where each token's document begins, (B, T)."""
    return starts_of_documents(position_ids.diff(dim=1) != 1)


def starts_of_documents(is_first: Tensor) -> Tensor:
    """is_first (B, T - 1): whether token t + 1 begins a document -> where each token's one begins, (B, T)."""
    place = torch.arange(1, is_first.size(1) + 1, device=is_first.device)
    zero = torch.zeros(is_first.size(0), 1, dtype=torch.int64, device=is_first.device)
    return torch.cat([zero, torch.where(is_first, place, 0)], 1).cummax(1).values


def documents(starts: Tensor) -> Tensor:
    """starts (B, T), within rows -> the form above."""
    B, T = starts.shape
    rows = torch.arange(B, device=starts.device)[:, None] * T
    ends = torch.full((1,), B * T, device=starts.device)
    return torch.cat([(starts + rows).flatten(), ends]).to(torch.int32)[None, None, None]


def ranges(stop: Tensor, start: Tensor | None) -> Tensor:
    """stop (T,), start (B,) -> the form above; without start (1, 1, T, 1), the same for all rows."""
    stop = stop.long()
    if start is None:
        return stop[None, None, :, None]
    return torch.stack(torch.broadcast_tensors(stop[None, :], start.long()[:, None]), -1)[:, None]


def lengths_and_starts(ranges: Tensor, B: int) -> tuple[Tensor, Tensor | None]:
    """Of ranges with one query: how many tokens lie before it in each row's cache, (B,) int32, and where they begin;
    None where all begin at 0."""
    first, *more = ranges[:, 0, 0].expand(B, -1).to(torch.int32).unbind(1)
    return (first - 1).contiguous(), more[0].contiguous() if more else None


def is_visible(mask: Any) -> bool:
    """Whether `mask` is one of the forms above, and not a mask of transformers or of the user."""
    return isinstance(mask, Tensor) and mask.dtype in (torch.int32, torch.int64)


def as_booleans(mask: Tensor | None, B: int, T: int, S: int) -> Tensor | None:
    """The same for PyTorch's attention of T queries over S keys: (B, 1, T, S) bool; None stays None."""
    if mask is None or not is_visible(mask):
        return mask
    if mask.dtype == torch.int32:
        return F.pad(ops.document_mask(mask.flatten(), B, T, ops.ALL_TORCH), (0, S - T))
    place = torch.arange(S, device=mask.device)
    seen = place < mask[..., :1]
    if mask.size(-1) == 2:
        seen = seen & (place >= mask[..., 1:])
    return seen.expand(B, 1, T, S)


def holds(condition: Tensor, message: str) -> bool:
    """Whether all of `condition` is true. Where code is being compiled that is not known yet: True, and what was
    compiled raises RuntimeError."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
        return True
    return bool(condition.all())


def encode(
    B: int,
    T: int,
    S: int,
    past: int | Tensor,
    real: Tensor | None = None,
    device: torch.device | str = "cpu",
    booleans: bool = False,
) -> Tensor | None:
    """T queries a row behind `past` tokens, over S keys, of which a static cache has more than there are tokens.

    real (B, S) bool: tokens that are no padding; None for all. booleans: where there is padding, a mask (B, 1, T, S)
    for PyTorch's attention, as transformers' own. Raises ValueError for padding between real tokens without.
    """
    compiling = torch.compiler.is_compiling()
    if isinstance(past, Tensor) and (T > 1 or real is not None) and not compiling:
        past = int(past)
    if real is not None and not compiling and bool(real[:, : past + T].all()):
        real = None  # the usual batch: the kernel without documents is faster
    known = not isinstance(past, Tensor)
    if real is None:
        if known and (past == 0 or (T == 1 and past + T == S)):
            return None
        return ranges(torch.arange(1, T + 1, device=device) + past, None)
    if booleans:
        last = torch.arange(T, device=device)[:, None] + past
        return (torch.arange(S, device=device) <= last) & real[:, None, None]
    one_run = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] <= 1
    if not holds(one_run, HOLES):
        raise ValueError(HOLES)
    if known and past == 0:
        return documents(starts_of_padding(real[:, :T]))
    return ranges(torch.arange(1, T + 1, device=device) + past, real.int().argmax(1))


def from_booleans(seen: Tensor, past: int | Tensor) -> Tensor | None:
    """The form above of who sees whom, (B, 1, T, S) bool, T queries behind `past` tokens.

    A token that neither sees itself nor is seen is padding. Raises ValueError unless every other query sees a run of
    keys that ends with itself, and each run is a document's.
    """
    wrong = "the mask lets tokens see something else than the tokens before them in their document"
    T, S = seen.shape[2:]
    if isinstance(past, Tensor) and not torch.compiler.is_compiling():
        past = int(past)
    at_start = isinstance(past, int) and past == 0
    seen = seen[:, 0]
    place = torch.arange(S, device=seen.device)
    stop = torch.arange(1, T + 1, device=seen.device) + past
    own = (stop - 1).expand(seen.shape[:2])  # (B, T)
    padding = ~seen.gather(2, own[:, :, None]).squeeze(2)
    starts = torch.where(padding, own, seen.int().argmax(2))  # (B, T)
    run = (place >= starts[:, :, None]) & (place < stop[:, None])
    unseen = ~seen.any(1).gather(1, own)
    same = starts[:, 1:] == starts[:, :-1]
    if at_start:
        same = same | (starts[:, 1:] == place[1:T])
    right = torch.where(padding, unseen, (run == seen).all(2))
    if not holds(right.all() & same.all(), wrong):
        raise ValueError(wrong)
    return documents(starts) if at_start else ranges(stop, starts[:, 0])
