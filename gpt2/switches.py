"""Which op is computed by Triton and which by PyTorch: `Kernels`, and what "auto" means on a device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
FORMER_NAMES = {"gelu": "mlp"}  # of switches; accepted wherever a switch is named


def current_names(toggles: Mapping[str, str]) -> dict[str, str]:
    """The switches by the names they have now.

    Raises ValueError if a switch is given by both of its names, with different values.
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
    """How each op is computed: "triton" or "torch". It says nothing about the model and goes into no checkpoint.

    attention: causal self-attention on packed q, k, v; one new token's attention over the cache.
    layer_norm: residual add + LayerNorm, with the projection's bias and dropout before it.
    mlp: the MLP, with GELU and bias in one kernel and little kept for backward. `gelu` is its former name.
    cross_entropy: the head's matrix product and the loss, without whole logits.
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
        """mlp: "torch" by default. gelu: the same switch by its former name.

        Raises ValueError for another backend, or if mlp and gelu differ, and ImportError for "triton" if it is not
        installed.
        """
        toggles = {name: backend for name, backend in (("mlp", mlp), ("gelu", gelu)) if backend is not None}
        toggles |= dict(attention=attention, layer_norm=layer_norm, cross_entropy=cross_entropy, embedding=embedding)
        for op, backend in toggles.items():
            if backend not in BACKENDS:
                raise ValueError(f"Kernels.{op} is {backend!r}, allowed are 'triton' and 'torch'")
        current = current_names(toggles)
        for op in self.names():
            object.__setattr__(self, op, current.get(op, "torch"))
        if not TRITON_INSTALLED and "triton" in dataclasses.astuple(self):
            raise ImportError(
                "kernels='triton' needs the package triton, which is not installed: "
                "pip install 'triton>=3.4' (Linux), or use kernels='torch'"
            )

    def __setstate__(self, state: dict[str, str]) -> None:
        """Unpickles what any version wrote."""
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
        """The ops that can be switched."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def parse(cls, spec: str | Kernels) -> Kernels:
        """ "triton", "torch", "attention,mlp" (those on Triton, the rest on PyTorch) or a Kernels, unchanged.

        Raises ValueError for a name that is none of these, TypeError for another type.
        """
        if isinstance(spec, Kernels):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"kernels is {spec!r}, expected a string or a Kernels")
        if spec.strip() in BACKENDS:
            return cls.all(spec.strip())
        ops = [FORMER_NAMES.get(op.strip(), op.strip()) for op in spec.split(",")]
        for op in ops:
            if op not in cls.names():
                raise ValueError(
                    f"kernels names {op!r}, allowed are 'auto' (for a model), 'triton' or 'torch', each alone, "
                    f"or a comma-separated list of {', '.join(cls.names())}"
                )
        return cls(**dict.fromkeys(ops, "triton"))


def kernels_digest() -> str:
    """SHA-256 of the kernels' files: figures and runs that belong together come from the same sources."""
    folder = Path(__file__).parents[1] / "kernels"
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


# Made once, so that torch.compile meets constants in `kernels_for`. Without Triton "auto" is PyTorch everywhere.
ALL_TORCH = Kernels.all("torch")
ALL_TRITON = Kernels.all("triton") if TRITON_INSTALLED else ALL_TORCH
TRITON_BUT_MLP = dataclasses.replace(ALL_TRITON, mlp="torch")


def requested_kernels(spec: str | Kernels, activation: str = "gelu_tanh") -> str | Kernels:
    """Checks a user's `kernels=` argument: "auto", which the device decides later, or a Kernels.

    The environment variable FASTGPT2_KERNELS, read here, sets what "auto" means. Raises ValueError for `mlp` on Triton
    where the model's activation is not the kernel's.
    """
    requested = _requested(spec)
    if isinstance(requested, Kernels) and requested.mlp == "triton" and activation != "gelu_tanh":
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


# Compute capability -> the ways to launch a training step in which Triton's kernels were measured slower than
# PyTorch's: "launched" (from Python), "graph" (`fastgpt2.graphed`) and "compile". What result files in bench/results
# say of these very kernels, and nothing else: a test compares.
SLOWER: dict[tuple[int, int], tuple[str, ...]] = {}
_in_graph = False


@contextlib.contextmanager
def graph_road() -> Iterator[None]:
    """Inside, "auto" is what it is for CUDA graphs: for warming up and capturing."""
    global _in_graph
    before, _in_graph = _in_graph, True
    try:
        yield
    finally:
        _in_graph = before


def kernels_for(spec: str | Kernels, device: torch.device, activation: str = "gelu_tanh") -> Kernels:
    """What `requested_kernels` returned, settled for a device and for how kernels are launched now: "auto" is Triton on
    CUDA and ROCm, but where that was measured slower, and PyTorch elsewhere and for an MLP of another activation than
    the kernel's."""
    if isinstance(spec, Kernels):
        return spec
    if device.type != "cuda":
        return ALL_TORCH
    if SLOWER:
        road = "compile" if torch.compiler.is_compiling() else "graph" if _in_graph else "launched"
        if road in SLOWER.get(torch.cuda.get_device_capability(device), ()):
            return ALL_TORCH
    return ALL_TRITON if activation == "gelu_tanh" else TRITON_BUT_MLP
