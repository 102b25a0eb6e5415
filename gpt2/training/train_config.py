"""The settings of a training run with their checks, settings files, and the presets."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.windows import MAX_SEED
from fastgpt2.gpt2.options import read_file
from fastgpt2.gpt2.training.settings import Settings
from fastgpt2.gpt2.weights.pretrained import open_checkpoint

ARCHITECTURE = ("n_layer", "n_head", "n_embd")  # what weights decide; of positions they have so many at most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The checked settings of one training run: `TrainConfig.from_preset("gpt2", steps=100)`.

    Raises ValueError for a value that is not allowed.
    """

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """One of `PRESETS` with some settings replaced.

        With `init_from` its sizes are those of the checkpoint, which is looked at, and not the preset's.
        Raises ValueError for an unknown name or a value that is not allowed, TypeError for an unknown setting; for
        `init_from` as `GPT.from_pretrained`.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown, there are {', '.join(PRESETS)}")
        source = overrides.get("init_from")
        sizes = {} if source is None else sizes_of(source)
        return cls(preset=name, **{**PRESETS[name], **sizes, **overrides})

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_interval", "eval_tokens", "keep"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, allowed are whole numbers of at least 1")
        for name in ("lr", "grad_clip", "spike"):
            if not 0.0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}, allowed are numbers above 0")
        for name in ("min_lr", "warmup", "weight_decay"):
            if not 0.0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}, allowed are numbers of at least 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, allowed are numbers up to lr, which is {self.lr}")
        for name in ("beta2", "val_fraction", "decay_fraction"):
            if not 0.0 < (value := getattr(self, name)) < 1.0:
                raise ValueError(f"{name} is {value}, allowed are numbers between 0 and 1")
        for name, hint in get_type_hints(type(self)).items():
            allowed, value = [a for a in get_args(hint) if isinstance(a, str)], getattr(self, name)
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
        if self.out is not None and self.out.encode("utf-8", "replace").decode() != self.out:
            raise ValueError(f"out is {self.out!r}, which is not UTF-8 text; safetensors reads no such path")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}, allowed are 0..{MAX_SEED}")
        self.model_config(vocab_size=1)
        self.grad_accum_steps(1)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The configuration of the model that is trained."""
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "vocab_multiple")
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})

    def text_tokenizer(self) -> str:
        """The tokenizer if the setting `tokenizer` is None and the data has none."""
        if not self.preset.startswith("gpt2"):
            return "char"
        return "byte" if self.preset.endswith("-smoke") else "gpt2"

    def grad_accum_steps(self, world_size: int) -> int:
        """The number of forward and backward passes that each rank makes in one step.

        Raises ValueError if the tokens of a step are not a whole number of passes of all ranks.
        """
        together = self.batch_size * self.block_size * world_size
        if self.total_batch_tokens is None:
            return 1
        if self.total_batch_tokens < 1 or self.total_batch_tokens % together:
            raise ValueError(
                f"total_batch_tokens is {self.total_batch_tokens}, allowed are multiples of batch_size "
                f"{self.batch_size} x block_size {self.block_size} x {world_size} ranks = {together}"
            )
        return self.total_batch_tokens // together

    def as_cuda_graph(self, world_size: int) -> bool:
        """Whether forward and backward are CUDA graphs. Raises ValueError if cuda_graph='on' but capture is not
        possible."""
        cuda, sharded = torch.device(self.device).type == "cuda", self.parallel == "fsdp" and world_size > 1
        if self.cuda_graph == "on" and not cuda:
            raise ValueError(f"cuda_graph is 'on' and device is {self.device!r}, allowed is a CUDA device")
        if self.cuda_graph == "on" and sharded:
            raise ValueError(f"cuda_graph is 'on' and parallel is 'fsdp' on {world_size} ranks, allowed is 'ddp'")
        return cuda and not sharded and self.cuda_graph != "off"

    def tokens_per_step(self, world_size: int = 1) -> int:
        """The number of tokens of one optimizer step over all ranks."""
        return self.grad_accum_steps(world_size) * self.batch_size * self.block_size * world_size

    def on_this_machine(self) -> TrainConfig:
        """The settings with "auto" in device and dtype replaced by its meaning on this machine.

        Raises ValueError for a device that cannot be used here.
        """
        device, dtype = find_device(self.device), self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        return dataclasses.replace(self, device=str(device), dtype=dtype)


def sizes_of(source: str) -> dict[str, int]:
    """What a checkpoint says of the model that `init_from` it begins with."""
    config = open_checkpoint(source).config
    return {name: getattr(config, name) for name in (*ARCHITECTURE, "block_size")}


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, else the CPU.

    Raises ValueError for a device that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # its message lists every type of device that PyTorch has a name for
        raise ValueError(f"device is {name!r}, allowed are auto, cpu, cuda, cuda:1 and others of PyTorch's") from None
    try:
        # Under torchrun each process tries its own GPU, because a try of the first one would take memory there.
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else device
        torch.empty(0, device=own)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here: {reason}") from None
    return device


# ---------------------------------------------------------------------------------------------------------- files


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads settings from a YAML file: {name: value}. Raises as `options.read_file`."""
    return read_file(path, Settings)


def settings_text(config: TrainConfig) -> str:
    """All settings as YAML for `read_settings`. `out` is None, because another run needs another folder."""
    import yaml

    return yaml.safe_dump({**dataclasses.asdict(config), "out": None}, sort_keys=False)


# -------------------------------------------------------------------------------------------------------- presets


# GPT-2's sizes with 524,288 tokens a step and 10B tokens (build-nanogpt); peak learning rates from GPT-3's table 2.1.
_GPT2 = dict(
    steps=19073, total_batch_tokens=2**19, batch_size=16, block_size=1024, n_layer=12, n_head=12,
    n_embd=768, dropout=0.0, vocab_multiple=128, lr=6e-4, min_lr=6e-5, warmup=715, beta2=0.95, eval_tokens=10 * 2**20,
)  # fmt: skip
_FINETUNE = dict(
    steps=200, batch_size=8, dropout=0.0, vocab_multiple=128, lr=3e-5, min_lr=3e-6, warmup=0, beta2=0.95,
    eval_interval=50, eval_tokens=2**16,
)  # fmt: skip
_MEDIUM = dict(n_layer=24, n_head=16, n_embd=1024, batch_size=8, lr=3e-4, min_lr=3e-5)
_LARGE = dict(n_layer=36, n_head=20, n_embd=1280, batch_size=4, lr=2.5e-4, min_lr=2.5e-5)
_XL = dict(n_layer=48, n_head=25, n_embd=1600, batch_size=4, lr=2e-4, min_lr=2e-5)
# A GPT-2 with its own depth, but with a width and number of steps for a CPU, and without a vocabulary to download. The
# tokens of a step are divisible by eight processes.
_SMOKE = dict(
    steps=30, total_batch_tokens=512, batch_size=1, block_size=64, n_head=4, n_embd=64, warmup=3,
    eval_interval=10, eval_tokens=2048,
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "baby": {},
    # The preset baby at a size that 2 CPU cores train in about two minutes.
    "baby-smoke": dict(
        steps=2000, batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, lr=3e-3,
        eval_tokens=15_360,
    ),
    "gpt2": _GPT2,
    "gpt2-smoke": _GPT2 | _SMOKE,
    "gpt2-medium": _GPT2 | _MEDIUM,
    "gpt2-medium-smoke": _GPT2 | _MEDIUM | _SMOKE,
    "gpt2-large": _GPT2 | _LARGE,
    "gpt2-large-smoke": _GPT2 | _LARGE | _SMOKE,
    "gpt2-xl": _GPT2 | _XL,
    "gpt2-xl-smoke": _GPT2 | _XL | _SMOKE,
    # For weights that exist: nanoGPT's finetune_shakespeare takes few steps at a twentieth of GPT-2's rate.
    "finetune": _FINETUNE,
    "finetune-smoke": _FINETUNE | dict(steps=20, batch_size=1, eval_interval=10, eval_tokens=4096),
}  # fmt: skip


def choose_preset(name: str | None, device: torch.device, init_from: str | None = None) -> tuple[str, str]:
    """(the preset of a run, what to print about it). name: the preset that the user asked for, or None."""
    usual = "baby" if init_from is None else "finetune"
    if name is not None and not isinstance(name, str):
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    if device.type == "cuda":
        return name or usual, f"on {torch.cuda.get_device_name(device)}"
    if name is None:
        return f"{usual}-smoke", f"no GPU here: {usual} at a size for a CPU"
    return name, "made for a CPU" if name.endswith("-smoke") else f"made for a GPU; {name}-smoke is made for a CPU"
