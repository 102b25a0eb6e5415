"""The types of the tuning table: the key of a row, and for each op the type of its configurations.

A configuration holds a kernel's block sizes, the launch options num_warps and num_stages, and further numbers from
which the launcher computes the grid (PROGRAMS_PER_SM, MIN_ROWS, ...).
"""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """The case that a row is for. Fields that do not matter for an op keep their defaults."""

    op: str  # such as "attention_fwd" for the kernel _attention_fwd_kernel
    bits: int = 0  # bits of an element
    head_size: int = 0  # the head size, padded to 64 or 128
    rows: int = 0  # rows of x that one program computes
    row_bytes: int = 0  # the largest width of a row, in bytes
    bounded: bool = False  # whether documents or a window bound attention
    dropout: bool = False

    def __str__(self) -> str:
        asked = [f"{name}={value}" for name, value in zip(self._fields[1:], self[1:], strict=True) if value]
        return " ".join([self.op, *asked])

    def plain(self) -> Key:
        """The same key without bounds and dropout. Its row is used if the table has none for them."""
        return self._replace(bounded=False, dropout=False)


class AttentionFwd(NamedTuple):
    """A program computes BLOCK_M queries, or 2 * BLOCK_M without bounds. BLOCK_N must divide BLOCK_M."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class AttentionTmaFwd(NamedTuple):
    """ON: whether this kernel computes what it can, or AttentionFwd's does. A program computes BLOCK_M queries. BLOCK_N
    must divide BLOCK_M."""

    ON: bool
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class AttentionDelta(NamedTuple):
    BLOCK_M: int
    num_warps: int


class AttentionBwd(NamedTuple):
    """A program computes either dk and dv of DKV_BLOCK_N keys, reading DKV_BLOCK_M queries at a time, or dq of
    DQ_BLOCK_M queries, reading DQ_BLOCK_N keys at a time. DIAGONAL_FIRST: dq begins on the diagonal, as dk and dv do,
    where nothing bounds attention. Otherwise the assembler for sm_90 waits for each product with some tiles."""

    DKV_BLOCK_M: int
    DKV_BLOCK_N: int
    DQ_BLOCK_M: int
    DQ_BLOCK_N: int
    num_warps: int
    num_stages: int
    DIAGONAL_FIRST: bool = False


class AttentionTmaBwd(NamedTuple):
    """ON: whether this kernel computes what it can, or AttentionBwd's does. A program computes dk and dv of BLOCK keys
    or dq of BLOCK queries, reading STEP rows at a time. STEP must divide BLOCK. STAGES: stages of the pipelines."""

    ON: bool
    BLOCK: int
    STEP: int
    num_warps: int
    STAGES: int


class DecodeAttention(NamedTuple):
    """STAGES: pipeline stages of the loop over tiles. A cache of up to ONE_SPLIT positions is not split."""

    BLOCK_N: int
    num_warps: int
    STAGES: int
    PROGRAMS_PER_SM: int
    ONE_SPLIT: int


class DecodeMerge(NamedTuple):
    BLOCK_P: int
    num_warps: int


class DecodeLinear(NamedTuple):
    """A program computes MIN_N to BLOCK_N rows of the weight, chosen to give about PER_SM programs a multiprocessor."""

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
    """SPAN_BYTES: bytes that the warps of one row load at once. MIN_ROWS: the fewest rows of a program, if there are
    that many. STAGES: pipeline stages of the loop over rows. FOLD: whether the last program adds up all programs' sums,
    or a second launch does."""

    ROWS: int
    SPAN_BYTES: int
    num_warps: int
    PROGRAMS_PER_SM: int
    MIN_ROWS: int
    STAGES: int = 1
    FOLD: bool = False


class Elementwise(NamedTuple):
    """For GELU's forward and the embedding: tiles of ROWS by BLOCK_C elements."""

    ROWS: int
    BLOCK_C: int
    num_warps: int


class GeluBwd(NamedTuple):
    """MIN_ROWS: the fewest rows of a program, if there are that many."""

    ROWS: int
    BLOCK_C: int
    num_warps: int
    PROGRAMS_PER_SM: int
    MIN_ROWS: int


class GeluProduct(NamedTuple):
    """A program computes tiles of BLOCK_M by BLOCK_N, in groups of GROUP_M tile rows, and finishes PIECES parts of a
    tile one after another."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    PIECES: int
    num_warps: int
    num_stages: int


class Mlp(NamedTuple):
    """FUSED: whether GELU is computed in the epilogue of our product, or in a pass beside PyTorch's."""

    FUSED: bool


class CrossEntropy(NamedTuple):
    BLOCK_V: int
    num_warps: int


class CrossEntropyRow(NamedTuple):
    """Rows of up to COLUMNS logits are held in registers. 0: none."""

    COLUMNS: int
    num_warps: int


class LossTotal(NamedTuple):
    BLOCK_N: int
    num_warps: int


class ScaleGradients(NamedTuple):
    BLOCK: int
    num_warps: int


class SegmentSum(NamedTuple):
    """WINDOW: the number of sorted tokens that a program reads."""

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
