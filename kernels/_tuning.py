"""All tuning numbers: block sizes, warps and stages, by case and architecture.

`fastgpt2 bench tune` rewrites this file. Nothing is tuned at run time.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from . import _device
from ._configurations import (
    AdamW,
    AttentionBwd,
    AttentionDelta,
    AttentionFwd,
    AttentionTmaBwd,
    AttentionTmaFwd,
    ColumnSum,
    CrossEntropy,
    CrossEntropyRow,
    DecodeAttention,
    DecodeLinear,
    DecodeMerge,
    Elementwise,
    GeluBwd,
    GeluProduct,
    Key,
    LayerNormBwd,
    LayerNormFwd,
    LossTotal,
    Mlp,
    ScaleGradients,
    SegmentSum,
)

# A compute capability (80, 86, 89, 90, 100, 120), "hip", or ANY for architectures without an entry.
Architecture: TypeAlias = "int | str"
ANY = "any"
Table: TypeAlias = "dict[Key, dict[Architecture, Any]]"  # all configurations of a key have the same type

# GPU and date of the measurements by `fastgpt2 bench tune`. Other architectures were tuned on compiled code alone.
TUNED: dict[Architecture, str] = {90: "NVIDIA H200, 2026-11-26"}

TABLE: Table = {
    # Bounds and random numbers need registers: smaller tiles avoid spills. Rows with dropout serve bounds too.
    Key("attention_fwd", bits=16, head_size=64): {
        ANY: AttentionFwd(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
        120: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    },
    Key("attention_fwd", bits=16, head_size=64, bounded=True): {
        ANY: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    },
    Key("attention_fwd", bits=16, head_size=64, dropout=True): {
        ANY: AttentionFwd(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=3),
    },
    Key("attention_fwd", bits=16, head_size=128): {
        ANY: AttentionFwd(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
        90: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
    },
    Key("attention_fwd", bits=16, head_size=128, bounded=True): {
        ANY: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
    },
    Key("attention_fwd", bits=16, head_size=128, dropout=True): {
        ANY: AttentionFwd(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
        100: AttentionFwd(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=2),
        120: AttentionFwd(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=2),
    },
    Key("attention_fwd", bits=32, head_size=64): {ANY: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=3)},
    Key("attention_fwd", bits=32, head_size=64, bounded=True): {
        ANY: AttentionFwd(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_fwd", bits=32, head_size=64, dropout=True): {
        ANY: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
        86: AttentionFwd(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1),
        89: AttentionFwd(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_fwd", bits=32, head_size=128): {
        ANY: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_fwd", bits=64, head_size=64): {ANY: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)},
    Key("attention_fwd", bits=64, head_size=128): {
        ANY: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    # Off, because nothing was measured: `fastgpt2 bench tune --op causal_attention` on a GPU decides.
    Key("attention_tma_fwd", bits=16, head_size=64): {
        ANY: AttentionTmaFwd(ON=False, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
        90: AttentionTmaFwd(ON=False, BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2),
    },
    Key("attention_delta", bits=16, head_size=64): {ANY: AttentionDelta(BLOCK_M=64, num_warps=4)},
    Key("attention_delta", bits=16, head_size=128): {ANY: AttentionDelta(BLOCK_M=32, num_warps=4)},
    Key("attention_delta", bits=32, head_size=64): {ANY: AttentionDelta(BLOCK_M=32, num_warps=4)},
    Key("attention_delta", bits=32, head_size=128): {ANY: AttentionDelta(BLOCK_M=16, num_warps=4)},
    Key("attention_delta", bits=64, head_size=64): {ANY: AttentionDelta(BLOCK_M=16, num_warps=4)},
    Key("attention_delta", bits=64, head_size=128): {ANY: AttentionDelta(BLOCK_M=16, num_warps=4)},
    Key("attention_bwd", bits=16, head_size=64): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=64, num_warps=4, num_stages=3),
        # 32 rows a warp need the fewest reads of shared memory for each product, and 255 registers.
        80: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=128, DQ_BLOCK_M=128, DQ_BLOCK_N=32, num_warps=4, num_stages=2),
        100: AttentionBwd(DKV_BLOCK_M=64, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=64, num_warps=4, num_stages=2),
    },
    Key("attention_bwd", bits=16, head_size=64, bounded=True): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=32, num_warps=4, num_stages=2),
        80: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=32, num_warps=4, num_stages=3),
    },
    Key("attention_bwd", bits=16, head_size=64, dropout=True): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=32, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=16, head_size=128): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=32, num_warps=8, num_stages=2),
        "hip": AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=16, head_size=128, bounded=True): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=32, num_warps=8, num_stages=2),
        "hip": AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=16, head_size=128, dropout=True): {
        ANY: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=32, num_warps=8, num_stages=2),
        "hip": AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=32, head_size=64): {
        ANY: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=32, head_size=64, dropout=True): {
        ANY: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=16, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=32, head_size=128): {
        ANY: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=16, DQ_BLOCK_N=16, num_warps=8, num_stages=1),
    },
    Key("attention_bwd", bits=64, head_size=64): {
        ANY: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=16, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    Key("attention_bwd", bits=64, head_size=128): {
        ANY: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=16, DQ_BLOCK_N=16, num_warps=4, num_stages=1),
    },
    # Off, because nothing was measured, as above.
    Key("attention_tma_bwd", bits=16, head_size=64): {
        ANY: AttentionTmaBwd(ON=False, BLOCK=64, STEP=64, num_warps=4, STAGES=2),
        90: AttentionTmaBwd(ON=False, BLOCK=128, STEP=64, num_warps=8, STAGES=2),
        120: AttentionTmaBwd(ON=False, BLOCK=64, STEP=16, num_warps=4, STAGES=2),
    },
    # A tile has 8 to 16 KiB of keys and as much of values. A cache of up to ONE_SPLIT positions is not split, because
    # merging would take longer than reading its few tiles one after another.
    Key("decode_attention", bits=16, head_size=64): {
        ANY: DecodeAttention(BLOCK_N=64, num_warps=4, STAGES=3, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_attention", bits=16, head_size=128): {
        ANY: DecodeAttention(BLOCK_N=32, num_warps=4, STAGES=3, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_attention", bits=32, head_size=64): {
        ANY: DecodeAttention(BLOCK_N=32, num_warps=4, STAGES=3, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_attention", bits=32, head_size=128): {
        ANY: DecodeAttention(BLOCK_N=32, num_warps=4, STAGES=2, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_attention", bits=64, head_size=64): {
        ANY: DecodeAttention(BLOCK_N=16, num_warps=4, STAGES=1, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_attention", bits=64, head_size=128): {
        ANY: DecodeAttention(BLOCK_N=16, num_warps=4, STAGES=1, PROGRAMS_PER_SM=2, ONE_SPLIT=256),
    },
    Key("decode_merge", bits=32, head_size=64): {ANY: DecodeMerge(BLOCK_P=16, num_warps=4)},
    Key("decode_merge", bits=32, head_size=128): {ANY: DecodeMerge(BLOCK_P=16, num_warps=4)},
    Key("decode_merge", bits=64, head_size=64): {ANY: DecodeMerge(BLOCK_P=16, num_warps=4)},
    Key("decode_merge", bits=64, head_size=128): {ANY: DecodeMerge(BLOCK_P=16, num_warps=4)},
    # A thread reads its part of one row of the weight with one or two 128-bit accesses.
    Key("decode_linear", bits=16, rows=1): {
        ANY: DecodeLinear(BLOCK_N=16, MIN_N=4, PER_SM=4, BLOCK_K=1024, num_stages=1, num_warps=4),
    },
    Key("decode_linear", bits=16, rows=16): {
        ANY: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=256, num_stages=3, num_warps=4),
        90: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=256, num_stages=4, num_warps=4),
    },
    Key("decode_linear", bits=16, rows=32): {
        ANY: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=256, num_stages=3, num_warps=4),
        120: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=256, num_stages=2, num_warps=4),
    },
    Key("decode_linear", bits=32, rows=1): {
        ANY: DecodeLinear(BLOCK_N=4, MIN_N=4, PER_SM=4, BLOCK_K=512, num_stages=1, num_warps=4),
    },
    Key("decode_linear", bits=32, rows=16): {
        ANY: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=64, num_stages=3, num_warps=4),
    },
    Key("decode_linear", bits=32, rows=32): {
        ANY: DecodeLinear(BLOCK_N=32, MIN_N=8, PER_SM=1, BLOCK_K=64, num_stages=3, num_warps=4),
    },
    Key("decode_linear", bits=64, rows=1): {
        ANY: DecodeLinear(BLOCK_N=8, MIN_N=4, PER_SM=4, BLOCK_K=256, num_stages=1, num_warps=4),
    },
    Key("decode_linear", bits=64, rows=16): {
        ANY: DecodeLinear(BLOCK_N=16, MIN_N=16, PER_SM=1, BLOCK_K=64, num_stages=1, num_warps=4),
    },
    Key("decode_linear", bits=64, rows=32): {
        ANY: DecodeLinear(BLOCK_N=16, MIN_N=16, PER_SM=1, BLOCK_K=64, num_stages=1, num_warps=4),
    },
    # Each warp of a row loads 512 bytes at once. With 64 rows a program, the partial sums that backward writes and
    # reads stay below 5% of its traffic.
    Key("layer_norm_fwd", row_bytes=512): {ANY: LayerNormFwd(num_warps=1, PROGRAMS_PER_SM=16)},
    Key("layer_norm_fwd", row_bytes=1024): {ANY: LayerNormFwd(num_warps=1, PROGRAMS_PER_SM=16)},
    Key("layer_norm_fwd", row_bytes=1536): {ANY: LayerNormFwd(num_warps=1, PROGRAMS_PER_SM=16)},
    Key("layer_norm_fwd", row_bytes=2048): {ANY: LayerNormFwd(num_warps=1, PROGRAMS_PER_SM=16)},
    Key("layer_norm_fwd", row_bytes=4096): {
        ANY: LayerNormFwd(num_warps=2, PROGRAMS_PER_SM=8),
        80: LayerNormFwd(num_warps=4, PROGRAMS_PER_SM=4),
    },
    Key("layer_norm_fwd", row_bytes=8192): {ANY: LayerNormFwd(num_warps=4, PROGRAMS_PER_SM=4)},
    Key("layer_norm_fwd", row_bytes=16384): {ANY: LayerNormFwd(num_warps=8, PROGRAMS_PER_SM=2)},
    Key("layer_norm_fwd", row_bytes=32768): {ANY: LayerNormFwd(num_warps=16, PROGRAMS_PER_SM=1)},
    Key("layer_norm_fwd", row_bytes=65536): {ANY: LayerNormFwd(num_warps=32, PROGRAMS_PER_SM=1)},
    Key("layer_norm_fwd", row_bytes=2048, dropout=True): {ANY: LayerNormFwd(num_warps=2, PROGRAMS_PER_SM=8)},
    Key("layer_norm_fwd", row_bytes=4096, dropout=True): {
        ANY: LayerNormFwd(num_warps=2, PROGRAMS_PER_SM=8),
        80: LayerNormFwd(num_warps=4, PROGRAMS_PER_SM=4),
    },
    Key("layer_norm_bwd", row_bytes=512): {
        ANY: LayerNormBwd(ROWS=8, SPAN_BYTES=512, num_warps=8, PROGRAMS_PER_SM=2, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=1024): {
        ANY: LayerNormBwd(ROWS=8, SPAN_BYTES=512, num_warps=8, PROGRAMS_PER_SM=2, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=1536): {
        ANY: LayerNormBwd(ROWS=8, SPAN_BYTES=512, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=2048): {
        ANY: LayerNormBwd(ROWS=4, SPAN_BYTES=1024, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=4096): {
        ANY: LayerNormBwd(ROWS=2, SPAN_BYTES=2048, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
        90: LayerNormBwd(ROWS=4, SPAN_BYTES=2048, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=8192): {
        ANY: LayerNormBwd(ROWS=1, SPAN_BYTES=4096, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=16384): {
        ANY: LayerNormBwd(ROWS=1, SPAN_BYTES=4096, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=32768): {
        ANY: LayerNormBwd(ROWS=1, SPAN_BYTES=8192, num_warps=16, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=65536): {
        ANY: LayerNormBwd(ROWS=1, SPAN_BYTES=16384, num_warps=32, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=1536, dropout=True): {
        ANY: LayerNormBwd(ROWS=4, SPAN_BYTES=1024, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    Key("layer_norm_bwd", row_bytes=4096, dropout=True): {
        ANY: LayerNormBwd(ROWS=2, SPAN_BYTES=2048, num_warps=8, PROGRAMS_PER_SM=1, MIN_ROWS=64),
    },
    # 256 columns are one 128-bit access of each lane of a warp, and they divide every MLP width of GPT-2.
    Key("gelu_fwd", bits=16): {ANY: Elementwise(ROWS=16, BLOCK_C=256, num_warps=4)},
    Key("gelu_fwd", bits=32): {ANY: Elementwise(ROWS=8, BLOCK_C=256, num_warps=4)},
    Key("gelu_fwd", bits=64): {ANY: Elementwise(ROWS=4, BLOCK_C=256, num_warps=4)},
    Key("gelu_bwd", bits=16): {
        ANY: GeluBwd(ROWS=8, BLOCK_C=256, num_warps=4, PROGRAMS_PER_SM=16, MIN_ROWS=64),
        90: GeluBwd(ROWS=4, BLOCK_C=128, num_warps=2, PROGRAMS_PER_SM=16, MIN_ROWS=64),
    },
    Key("gelu_bwd", bits=32): {ANY: GeluBwd(ROWS=8, BLOCK_C=256, num_warps=4, PROGRAMS_PER_SM=16, MIN_ROWS=64)},
    Key("gelu_bwd", bits=64): {ANY: GeluBwd(ROWS=4, BLOCK_C=256, num_warps=4, PROGRAMS_PER_SM=16, MIN_ROWS=64)},
    # The sums of a tile take up to half of the registers. No row is measured yet.
    Key("gelu_product_fwd", bits=16): {
        ANY: GeluProduct(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PIECES=2, num_warps=8, num_stages=3),
        90: GeluProduct(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, PIECES=2, num_warps=8, num_stages=3),
        100: GeluProduct(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, PIECES=4, num_warps=8, num_stages=3),
    },
    Key("gelu_product_bwd", bits=16): {
        ANY: GeluProduct(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PIECES=2, num_warps=8, num_stages=3),
        90: GeluProduct(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, PIECES=8, num_warps=8, num_stages=3),
        100: GeluProduct(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, PIECES=4, num_warps=8, num_stages=3),
    },
    Key("gelu_product_fwd", bits=32): {
        ANY: GeluProduct(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, PIECES=1, num_warps=4, num_stages=2),
    },
    Key("gelu_product_bwd", bits=32): {
        ANY: GeluProduct(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, PIECES=1, num_warps=8, num_stages=2),
    },
    Key("gelu_product_fwd", bits=64): {
        ANY: GeluProduct(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, PIECES=1, num_warps=4, num_stages=1),
    },
    Key("gelu_product_bwd", bits=64): {
        ANY: GeluProduct(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, PIECES=1, num_warps=4, num_stages=1),
    },
    # Only PyTorch's products with a pass were measured so far.
    Key("mlp_fwd", bits=16): {ANY: Mlp(FUSED=False)},
    Key("mlp_fwd", bits=32): {ANY: Mlp(FUSED=False)},
    Key("mlp_fwd", bits=64): {ANY: Mlp(FUSED=False)},
    Key("mlp_bwd", bits=16): {ANY: Mlp(FUSED=False)},
    Key("mlp_bwd", bits=32): {ANY: Mlp(FUSED=False)},
    Key("mlp_bwd", bits=64): {ANY: Mlp(FUSED=False)},
    # Few and wide programs on each SM, so that the rows fit in L2 until they are read a second time: 6 MB on sm_86,
    # 40 MB and more on the others.
    Key("cross_entropy", bits=16): {
        ANY: CrossEntropy(BLOCK_V=4096, num_warps=16),
        86: CrossEntropy(BLOCK_V=8192, num_warps=32),
    },
    Key("cross_entropy", bits=32): {ANY: CrossEntropy(BLOCK_V=4096, num_warps=16)},
    Key("cross_entropy", bits=64): {ANY: CrossEntropy(BLOCK_V=1024, num_warps=8)},
    Key("cross_entropy_row", bits=16): {ANY: CrossEntropyRow(COLUMNS=0, num_warps=8)},
    Key("cross_entropy_row", bits=32): {ANY: CrossEntropyRow(COLUMNS=0, num_warps=8)},
    Key("cross_entropy_row", bits=64): {ANY: CrossEntropyRow(COLUMNS=0, num_warps=8)},
    Key("loss_total"): {ANY: LossTotal(BLOCK_N=4096, num_warps=8)},
    Key("scale_gradients"): {ANY: ScaleGradients(BLOCK=4096, num_warps=8)},
    Key("embedding_fwd"): {ANY: Elementwise(ROWS=8, BLOCK_C=256, num_warps=4)},
    Key("embedding_batch_sum"): {ANY: Elementwise(ROWS=4, BLOCK_C=256, num_warps=4)},
    # Wide blocks, because every program of a row reads the window's keys again.
    Key("embedding_segment_sum"): {ANY: SegmentSum(WINDOW=32, ROWS=8, BLOCK_C=1024, num_warps=4)},
    Key("column_sum"): {ANY: ColumnSum(BLOCK_P=32, BLOCK_C=64, num_warps=4)},
    # A thread's part of a block is two 128-bit accesses to each of p, g, m, v. Every program reads a sum a chunk.
    Key("adamw", bits=16): {ANY: AdamW(CHUNK=32768, BLOCK=2048, num_warps=4)},
    Key("adamw", bits=32): {ANY: AdamW(CHUNK=32768, BLOCK=1024, num_warps=4)},
    Key("adamw", bits=64): {ANY: AdamW(CHUNK=32768, BLOCK=512, num_warps=4)},
}

# Rows that replace those of TABLE before a version of Triton with which the latter would spill registers or fail to
# compile. Versions are in rising order, and the first row found is used.
BEFORE_TRITON: dict[tuple[int, int], Table] = {
    (3, 5): {
        Key("attention_bwd", bits=16, head_size=64): {
            80: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=64, num_warps=4, num_stages=3),
        },
    },
    (3, 6): {  # before it, tl.dot needs at least 16 columns
        Key("decode_linear", bits=16, rows=16): {
            ANY: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=256, num_stages=3, num_warps=4),
            90: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=256, num_stages=4, num_warps=4),
        },
        Key("decode_linear", bits=16, rows=32): {
            ANY: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=256, num_stages=3, num_warps=4),
            120: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=256, num_stages=2, num_warps=4),
        },
        Key("decode_linear", bits=32, rows=16): {
            ANY: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=64, num_stages=3, num_warps=4),
        },
        Key("decode_linear", bits=32, rows=32): {
            ANY: DecodeLinear(BLOCK_N=32, MIN_N=16, PER_SM=1, BLOCK_K=64, num_stages=3, num_warps=4),
        },
    },
    (3, 7): {
        Key("attention_fwd", bits=16, head_size=64): {
            86: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
            89: AttentionFwd(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
        },
        Key("gelu_bwd", bits=16): {
            ANY: GeluBwd(ROWS=4, BLOCK_C=256, num_warps=4, PROGRAMS_PER_SM=16, MIN_ROWS=64),
            90: GeluBwd(ROWS=4, BLOCK_C=128, num_warps=2, PROGRAMS_PER_SM=16, MIN_ROWS=64),
        },
    },
    (3, 9): {
        Key("attention_bwd", bits=16, head_size=64): {
            80: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=64, DQ_BLOCK_M=64, DQ_BLOCK_N=64, num_warps=4, num_stages=2),
        },
        Key("attention_bwd", bits=16, head_size=64, bounded=True): {
            86: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16, num_warps=4, num_stages=2),
            89: AttentionBwd(DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16, num_warps=4, num_stages=2),
        },
        Key("attention_bwd", bits=16, head_size=64, dropout=True): {
            90: AttentionBwd(DKV_BLOCK_M=32, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=32, num_warps=4, num_stages=2),
        },
        Key("attention_fwd", bits=32, head_size=64, bounded=True): {
            80: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=3),
            86: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1),
            89: AttentionFwd(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1),
        },
        Key("layer_norm_fwd", row_bytes=4096, dropout=True): {ANY: LayerNormFwd(num_warps=4, PROGRAMS_PER_SM=4)},
    },
}


def config(key: Key, device: torch.device) -> dict[str, int]:
    """Block sizes and launch options by name: `kernel[grid](..., **config(Key("column_sum"), device))`.

    Raises KeyError if the table has no row for `key`.
    """
    # Contracting a * b + c into one rounding is set explicitly, because Triton 3.10 changes the default.
    return row(key, _device.architecture(device))._asdict() | {"enable_fp_fusion": True}


def row(key: Key, architecture: Architecture) -> Any:
    """The configuration of `key` for this version of Triton, or of `key.plain()` if the table has no row for it."""
    known = key if key in TABLE else key.plain()
    older = (table for version, table in BEFORE_TRITON.items() if _device.TRITON_VERSION < version)
    for table in (*older, TABLE):
        rows = table.get(known, {})
        if found := rows.get(architecture, rows.get(ANY)):
            return found
    raise KeyError(f"the tuning table has no row for {key} on {architecture}")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. On the host, `triton.cdiv` takes ten times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
