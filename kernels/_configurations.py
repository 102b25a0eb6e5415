"""What a row of the tuning table consists of: the key, which says what it is for, and one configuration type an op.

A configuration holds a kernel's block sizes and the launch options num_warps and num_stages. Where its launcher needs
more to choose a grid (PROGRAMS_PER_SM, MIN_ROWS, ...), that is there too.
"""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """What a row is for. Fields that an op does not depend on keep their defaults."""

    op: str  # "attention_fwd": the kernel without its underscores
    bits: int = 0  # of an element
    head_size: int = 0  # heads are padded up to 64 or 128
    rows: int = 0  # of x, that a program takes
    row_bytes: int = 0  # rows are at most so wide
    bounded: bool = False  # by documents or a window
    dropout: bool = False

    def __str__(self) -> str:
        asked = [f"{name}={value}" for name, value in zip(self._fields[1:], self[1:], strict=True) if value]
        return " ".join([self.op, *asked])

    def plain(self) -> Key:
        """The same without bounds and dropout, whose row stands for both where they have none."""
        return self._replace(bounded=False, dropout=False)


class AttentionFwd(NamedTuple):
    """A program takes BLOCK_M queries, or twice as many without bounds. BLOCK_N divides BLOCK_M."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class AttentionDelta(NamedTuple):
    BLOCK_M: int
    num_warps: int


class AttentionBwd(NamedTuple):
    """A program takes either DKV_BLOCK_N keys, DKV_BLOCK_M queries at a time, or the other way round."""

    DKV_BLOCK_M: int
    DKV_BLOCK_N: int
    DQ_BLOCK_M: int
    DQ_BLOCK_N: int
    num_warps: int
    num_stages: int


class DecodeAttention(NamedTuple):
    """STAGES: tiles under way. A cache of up to ONE_SPLIT places is not split."""

    BLOCK_N: int
    num_warps: int
    STAGES: int
    PROGRAMS_PER_SM: int
    ONE_SPLIT: int


class DecodeMerge(NamedTuple):
    BLOCK_P: int
    num_warps: int


class DecodeLinear(NamedTuple):
    """A program takes as many of the weight's rows as makes PER_SM of them, from MIN_N to BLOCK_N."""

    BLOCK_N: int
    MIN_N: int
    PER_SM: int
    BLOCK_K: int
    num_stages: int
    num_warps: int


class LayerNormFwd(NamedTuple):
    num_warps: int
    PROGRAMS_PER_SM: int


class LayerNormBwd(NamedTuple):
    """SPAN_BYTES: what the warps of one row take in one go. MIN_ROWS: that a program takes, where there are so many."""

    ROWS: int
    SPAN_BYTES: int
    num_warps: int
    PROGRAMS_PER_SM: int
    MIN_ROWS: int


class Elementwise(NamedTuple):
    """Of GELU's forward and of the embedding: tiles of ROWS by BLOCK_C."""

    ROWS: int
    BLOCK_C: int
    num_warps: int


class GeluBwd(NamedTuple):
    """MIN_ROWS: that a program takes, where there are so many."""

    ROWS: int
    BLOCK_C: int
    num_warps: int
    PROGRAMS_PER_SM: int
    MIN_ROWS: int


class CrossEntropy(NamedTuple):
    BLOCK_V: int
    num_warps: int


class LossTotal(NamedTuple):
    BLOCK_N: int
    num_warps: int


class ScaleGradients(NamedTuple):
    BLOCK: int
    num_warps: int


class SegmentSum(NamedTuple):
    """WINDOW: sorted tokens that a program looks at."""

    WINDOW: int
    ROWS: int
    BLOCK_C: int
    num_warps: int


class ColumnSum(NamedTuple):
    BLOCK_P: int
    BLOCK_C: int
    num_warps: int


class AdamW(NamedTuple):
    """A program takes CHUNK elements of one parameter, BLOCK at a time."""

    CHUNK: int
    BLOCK: int
    num_warps: int
