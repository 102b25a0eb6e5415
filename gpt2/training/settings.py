"""All settings of a training run. The fields are the options of `fastgpt2 train`, and the comments are their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """The settings as plain values; `training.train_config.TrainConfig` checks them. The defaults are preset baby's."""

    preset: str = "baby"  # the defaults: baby, gpt2, gpt2-medium, -large, -xl, finetune; with -smoke for a CPU
    init_from: str | None = None  # weights to begin with: gpt2, a run, a checkpoint of ours, HuggingFace's, nanoGPT's
    data: str | None = None  # text (file or folder), or token shards of `prepare`; None: Python library's sources
    tokenizer: str | None = None  # char, byte, gpt2, or a vocabulary's path; None: that of data, weights or preset
    out: str | None = None  # the run's folder; None: runs/DATE-TIME-PRESET

    steps: int = 5000  # optimizer steps; without a GPU and without a preset: as many as take two minutes
    total_batch_tokens: int | None = None  # tokens a step, all ranks and passes; None: one pass of each rank
    batch_size: int = 64  # sequences in one forward and backward pass of one rank
    block_size: int = 256  # tokens a sequence
    n_layer: int = 6  # blocks
    n_head: int = 6  # attention heads a block
    n_embd: int = 384  # channels
    dropout: float = 0.2  # probability after the embedding, in attention and after each branch
    vocab_multiple: int = 1  # the token table is padded to a multiple of this

    lr: float = 1e-3  # peak learning rate
    min_lr: float = 1e-4  # learning rate at the end
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: a cosine, or stable and then a linear decay
    decay_fraction: float = 0.2  # wsd: the part of the steps, at their end, in which the rate falls
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings only
    beta2: float = 0.99  # AdamW's second beta; the first is 0.9
    grad_clip: float = 1.0  # largest norm of the gradient
    spike: float = 10.0  # a loss this many standard deviations above the last 20 makes a bad step, as NaN does
    bad_steps: Literal["stop", "skip"] = "stop"  # end the run with an error, or leave out the update and go on

    document_mask: bool = False  # attention stays inside documents, which the tokenizer's end of text separates
    val_fraction: float = 0.1  # part of a text, at its end, held out for validation; shards have a part of their own
    eval_interval: int = 250  # steps between two validation losses, each with a checkpoint
    keep: int = 2  # checkpoints that stay, the newest ones
    eval_tokens: int = 327_680  # tokens in one validation loss, always the same ones
    hellaswag: str | None = None  # HellaSwag's .jsonl, or download: build-nanogpt's acc_norm at each validation
    seed: int = 1337  # of weights, dropout and the order of the data

    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: CUDA or ROCm where there is one
    dtype: DtypeName = "auto"  # of matrix products, by autocast; auto: bfloat16 on CUDA, float32 elsewhere
    residual: Literal["float32", "bfloat16"] = "float32"  # the residual stream's under autocast to bfloat16
    kernels: str = "auto"  # auto, triton, torch, or a list such as attention=cudnn,mlp; auto: triton on CUDA
    optimizer: Literal["torch", "triton"] = "torch"  # AdamW; triton: with clipping in two launches, not timed on a GPU
    compile: bool = False  # train through torch.compile
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # a pass is two launches; auto: on GPUs, where it is possible
    recompute: bool = False  # activation checkpointing: keep blocks' inputs only, compute the rest again in backward
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: each rank has the whole model, or a part of it (FSDP2)

    tensorboard: bool = False  # event files in the run's folder
    wandb: bool = False  # Weights & Biases
