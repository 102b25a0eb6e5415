"""Which ops Triton computes and which PyTorch: `Kernels`, and the meaning of "auto" on a device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    TRITON_INSTALLED = False
else:
    TRITON_INSTALLED = True

BACKENDS = ("triton", "torch")
# Values of single switches beside BACKENDS, which "auto" never chooses: by Triton, and by PyTorch.
FURTHER_VALUES = {"mlp": ("fused",)}
PYTORCH_VALUES = {"attention": ("cudnn",)}
FORMER_NAMES = {"gelu": "mlp"}  # of switches, accepted wherever a switch is named


def current_names(toggles: Mapping[str, str]) -> dict[str, str]:
    """`toggles` with former names replaced by current ones.

    Raises ValueError if a switch is given under both of its names with different values.
    """
    current: dict[str, str] = {}
    for name, backend in toggles.items():
        now = FORMER_NAMES.get(name, name)
        if current.setdefault(now, backend) != backend:
            given = " and ".join(f"{n}={b!r}" for n, b in toggles.items() if FORMER_NAMES.get(n, n) == now)
            raise ValueError(f"{given} are two names of one switch with different values: give {now} only")
    return current


@dataclass(frozen=True, init=False)
class Kernels:
    """How each op is computed: "triton", "torch" or, for mlp, "fused". It does not describe the model and is not saved
    in checkpoints.

    attention: causal self-attention on packed q, k, v, and the attention of one new token over the cache. "cudnn" is
        PyTorch's attention by cuDNN alone; one new token over the cache is then as with "torch".
    layer_norm: residual add + LayerNorm, with the preceding projection's bias and dropout.
    mlp: the MLP, with GELU and bias in one kernel and fewer activations kept for backward. Its former name is `gelu`.
        "fused" computes both inside Triton's own products, which have not been timed yet.
    cross_entropy: the head's matrix product and the loss, without computing all logits at once.
    embedding: token and position embedding.
    """

    attention: str = "torch"
    layer_norm: str = "torch"
    mlp: str = "torch"
    cross_entropy: str = "torch"
    embedding: str = "torch"

    def __init__(
        self,
        attention: str = "torch",
        layer_norm: str = "torch",
        mlp: str | None = None,
        cross_entropy: str = "torch",
        embedding: str = "torch",
        *,
        gelu: str | None = None,
    ):
        """mlp: "torch" by default. gelu: the former name of the switch mlp.

        Raises ValueError for an unknown backend or if mlp and gelu differ, ImportError if "triton" is chosen and the
        package is not installed.
        """
        toggles = {name: backend for name, backend in (("mlp", mlp), ("gelu", gelu)) if backend is not None}
        toggles |= dict(attention=attention, layer_norm=layer_norm, cross_entropy=cross_entropy, embedding=embedding)
        for op, backend in toggles.items():
            name = FORMER_NAMES.get(op, op)
            allowed = (*BACKENDS, *FURTHER_VALUES.get(name, ()), *PYTORCH_VALUES.get(name, ()))
            if backend not in allowed:
                raise ValueError(
                    f"Kernels.{op} is {backend!r}, allowed are {', '.join(map(repr, allowed[:-1]))} and {allowed[-1]!r}"
                )
        current = current_names(toggles)
        for op in self.names():
            object.__setattr__(self, op, current.get(op, "torch"))
        by_pytorch = {"torch", *itertools.chain(*PYTORCH_VALUES.values())}
        if not TRITON_INSTALLED and not by_pytorch.issuperset(dataclasses.astuple(self)):
            raise ImportError(
                "kernels='triton' needs the package triton, which is not installed: "
                "pip install 'triton>=3.4' (Linux), or use kernels='torch'"
            )

    def __setstate__(self, state: dict[str, str]) -> None:
        """Also unpickles instances of earlier versions, which had the field gelu."""
        Kernels.__init__(self, **state)

    @property
    def gelu(self) -> str:
        """The former name of `mlp`."""
        return self.mlp

    @classmethod
    def all(cls, backend: str) -> Kernels:
        """Every op on one backend."""
        return cls(**dict.fromkeys(cls.names(), backend))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the switches."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def parse(cls, spec: str | Kernels) -> Kernels:
        """Reads "triton", "torch" or a list such as "attention=cudnn,mlp": these on Triton, or as the word after =, and
        the rest on PyTorch.

        A `Kernels` is returned unchanged. Raises ValueError for an unknown name, TypeError for another type.
        """
        if isinstance(spec, Kernels):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"kernels is {spec!r}, expected a string or a Kernels")
        if spec.strip() in BACKENDS:
            return cls.all(spec.strip())
        chosen: dict[str, str] = {}
        for item in map(str.strip, spec.split(",")):
            op, equals, value = map(str.strip, item.partition("="))
            op, value = FORMER_NAMES.get(op, op), value if equals else "triton"
            if op not in cls.names() or not value:
                raise ValueError(
                    f"kernels names {item!r}, allowed are 'auto' (for a model), 'triton' or 'torch', each alone, "
                    f"or a comma-separated list of {', '.join(cls.names())}, or of these with values (attention=cudnn)"
                )
            if chosen.setdefault(op, value) != value:
                raise ValueError(f"kernels is {spec!r}, which gives {op} two values")
        return cls(**chosen)


def kernels_digest() -> str:
    """SHA-256 of the source files in kernels/, to tell whether two results come from the same kernels."""
    folder = Path(__file__).parents[1] / "kernels"
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


# Created once, so that they are constants for torch.compile in `kernels_for`. Without Triton, "auto" means PyTorch.
ALL_TORCH = Kernels.all("torch")
ALL_TRITON = Kernels.all("triton") if TRITON_INSTALLED else ALL_TORCH
TRITON_BUT_MLP = dataclasses.replace(ALL_TRITON, mlp="torch")


def requested_kernels(spec: str | Kernels, activation: str = "gelu_tanh", cudnn: bool = True) -> str | Kernels:
    """Checks a user's argument `kernels` and returns "auto", which `kernels_for` resolves for a device, or a Kernels.

    The environment variable FASTGPT2_KERNELS, read here, replaces "auto". Raises ValueError for an unknown name, for
    `mlp` on Triton if the model's activation is another one than the kernel's, and for attention by cuDNN if `cudnn` is
    False.
    """
    requested = _requested(spec)
    if isinstance(requested, Kernels) and requested.attention == "cudnn" and not cudnn:
        raise ValueError("kernels has attention='cudnn', allowed for models of transformers are 'triton' and 'torch'")
    if isinstance(requested, Kernels) and requested.mlp != "torch" and activation != "gelu_tanh":
        others = ",".join(op for op in Kernels.names() if op != "mlp")
        raise ValueError(
            f"kernels has mlp on Triton, which computes GELU by tanh, and the model's activation is {activation!r}: "
            f"leave mlp to PyTorch, as kernels={others!r} does"
        )
    return requested


def _requested(spec: str | Kernels) -> str | Kernels:
    if spec != "auto":
        return Kernels.parse(spec)
    spec = os.environ.get("FASTGPT2_KERNELS") or "auto"
    try:
        return "auto" if spec.strip() == "auto" else Kernels.parse(spec)
    except ValueError as error:
        raise ValueError(f"the environment variable FASTGPT2_KERNELS is {spec!r}: {error}") from None


# Compute capability -> the ways of launching a training step with which Triton's kernels were measured to be slower
# than PyTorch's: "launched" (from Python), "graph" (`fastgpt2.graphed`) and "compile". A test checks that these entries
# are exactly what the result files in bench/results say about the current kernels.
SLOWER: dict[tuple[int, int], tuple[str, ...]] = {}
_in_graph = False


@contextlib.contextmanager
def launched_by_graph() -> Iterator[None]:
    """Inside, "auto" has its meaning for CUDA graphs. Used while warming up for a capture and capturing."""
    global _in_graph
    before, _in_graph = _in_graph, True
    try:
        yield
    finally:
        _in_graph = before


def kernels_for(spec: str | Kernels, device: torch.device, activation: str = "gelu_tanh") -> Kernels:
    """Resolves what `requested_kernels` returned for a device and the current way of launching kernels.

    "auto" is Triton on CUDA and ROCm, except where it was measured to be slower (`SLOWER`), and PyTorch elsewhere. The
    MLP is PyTorch's if the model's activation is another one than the kernel's.
    """
    if isinstance(spec, Kernels):
        return spec
    if device.type != "cuda":
        return ALL_TORCH
    if SLOWER:
        launched = "graph" if _in_graph else "launched"
        if torch.compiler.is_compiling():
            launched = "compile"
        if launched in SLOWER.get(torch.cuda.get_device_capability(device), ()):
            return ALL_TORCH
    return ALL_TRITON if activation == "gelu_tanh" else TRITON_BUT_MLP
