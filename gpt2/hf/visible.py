"""The keys that each query sees, in a form for the kernels and as a tensor that transformers passes on like a mask.

Every query sees consecutive keys that end with itself. If they begin with the first key the form is None, otherwise

    documents   int32 (1, 1, 1, B*T + 1)    for T queries against the same T tokens: the first key of each of the B*T
                                            flattened tokens, then B*T. Neighbours with the same one form a document.
    ranges      int64 (B, 1, T, 1 or 2)     for T queries after tokens in a cache: the end of the keys and, if it may
                                            differ from 0, their beginning

Both have four dimensions, because transformers leaves such a mask unchanged. Their sizes depend only on shapes, so that
nothing waits for the device and equal shapes give equal launches. Padding on the left or right is a separate document:
real tokens see the right keys, and padding sees padding.
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
    """real (B, T) bool, one run of True a row -> the start of each token's run of equal values, (B, T)."""
    return starts_of_documents(real[:, 1:] != real[:, :-1])


def starts_of_positions(position_ids: Tensor) -> Tensor:
    """position_ids (B, T), which restart at the start of a document -> the start of each token's document, (B, T)."""
    return starts_of_documents(position_ids.diff(dim=1) != 1)


def starts_of_documents(is_first: Tensor) -> Tensor:
    """is_first (B, T - 1), whether token t + 1 begins a document -> the start of each token's document, (B, T)."""
    place = torch.arange(1, is_first.size(1) + 1, device=is_first.device)
    zero = torch.zeros(is_first.size(0), 1, dtype=torch.int64, device=is_first.device)
    return torch.cat([zero, torch.where(is_first, place, 0)], 1).cummax(1).values


def documents(starts: Tensor) -> Tensor:
    """starts (B, T), each token's start within its row -> the form `documents` above."""
    B, T = starts.shape
    rows = torch.arange(B, device=starts.device)[:, None] * T
    ends = torch.full((1,), B * T, device=starts.device)
    return torch.cat([(starts + rows).flatten(), ends]).to(torch.int32)[None, None, None]


def ranges(stop: Tensor, start: Tensor | None) -> Tensor:
    """stop (T,), start (B,) -> the form `ranges` above. Without start it is (1, 1, T, 1), the same for all rows."""
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
    """Whether `mask` has one of the forms above, and is not a mask of transformers or of the user."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    ranges = mask.dtype == torch.int64 and mask.size(1) == 1 and mask.size(3) in (1, 2)
    return ranges or (mask.dtype == torch.int32 and mask.shape[:3] == (1, 1, 1))


def as_booleans(mask: Tensor | None, B: int, T: int, S: int) -> Tensor | None:
    """The mask as booleans for PyTorch's attention of T queries over S keys: (B, 1, T, S). None stays None."""
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
    """Whether all of `condition` is true. Under torch.compile this is not known yet: returns True, and the compiled
    code raises RuntimeError if it is not."""
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
    """The form above for T queries a row after `past` tokens, over S keys. A static cache has more keys than tokens.

    real (B, S) bool: the tokens that are not padding; None if all are real. booleans: if there is padding, returns a
    mask (B, 1, T, S) for PyTorch's attention instead. Without it, raises ValueError for padding between real tokens.
    """
    compiling = torch.compiler.is_compiling()
    if isinstance(past, Tensor) and (T > 1 or real is not None) and not compiling:
        past = int(past)
    if real is not None and not compiling and bool(real[:, : past + T].all()):
        real = None  # a batch without padding, for which the kernel without documents is faster
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
    """The form above of the mask `seen` (B, 1, T, S) bool for T queries after `past` tokens.

    A token that neither sees itself nor is seen by any query is padding. Raises ValueError unless every other query
    sees consecutive keys that end with itself and begin with its document.
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
