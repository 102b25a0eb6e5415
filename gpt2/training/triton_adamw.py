"""`TritonAdamW`: torch.optim.AdamW computed by Triton, gradient clipping included, in two launches.

    optimizer = TritonAdamW(model.parameters(), lr=6e-4, max_norm=1.0)      # or model.configure_optimizers(...)
    loss.backward()
    optimizer.step()                                                        # clips too
    optimizer.grad_norm                                                     # before clipping, on the device

A torch.optim.AdamW in everything else: groups, hooks, schedulers, and a state_dict that either of them loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt2.gpt2 import hardware, ops
from fastgpt2.gpt2.shadow import Shadow, forget, shadow_of

REFUSED = ("amsgrad", "maximize", "differentiable")


class TritonAdamW(torch.optim.AdamW):
    """AdamW whose step is the norm of all gradients, clipping, decay and update, in two launches a dtype.

    Under autocast, passes of a model of this package read 16-bit copies of its matrices that the step writes, and cast
    none (see `fastgpt2.gpt2.shadow`): 2 bytes a parameter that stay allocated between steps.
    grad_norm: of the last step, before clipping, a scalar on the device; None without max_norm.
    With FSDP2 it is the norm of all ranks' shards: one all_reduce and two launches more.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
    ):
        """params: as torch.optim takes them. lr: a float32 tensor on the parameters' device is read anew in each replay
        of a CUDA graph. max_norm: what the norm of all gradients is clipped to, as by
        torch.nn.utils.clip_grad_norm_; None: no clipping.

        Raises ImportError without Triton, ValueError for a max_norm that is not above 0; `step` raises TypeError or
        ValueError naming the parameter for dtypes and memory that the kernels do not take.
        """
        if not ops.TRITON_INSTALLED:
            raise ImportError("optimizer='triton' needs the package triton, which is not installed: use 'torch'")
        if max_norm is not None and not 0.0 < max_norm < math.inf:
            raise ValueError(f"max_norm is {max_norm}, allowed are numbers above 0, and None for no clipping")
        # `fused`: a torch.optim.AdamW that loads this state, and GradScaler, take it for what it is.
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self.max_norm, self.grad_norm = max_norm, None

    # Kept by no state_dict: how a step is computed, not what it starts from.
    max_norm: float | None = None
    grad_norm: Tensor | None = None
    _update: ops.TritonAdamWUpdate | None = None
    _members: tuple = ()  # what `_update` was made for
    _begun: tuple | None = None  # gradients and settings whose norm is summed up and not used yet
    _reduced: Tensor | None = None  # the sum of squares of all ranks, where parameters are shards
    _shadows: dict[Tensor, Shadow | None] | None = None  # of every parameter, where it can have one
    _written: tuple | list[Shadow] = ()  # those that the step which has begun writes

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is unpickled or loaded, laid out for the kernels, whatever it was computed by before."""
        super().__setstate__(state)
        self._update, self._begun = None, None
        for group in self.param_groups:
            group.update(fused=True, foreach=None, capturable=False)
            for p in group["params"]:
                if own := self.state.get(p):
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        own[name] = _like(own[name], p)
        self._find_shadows()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._find_shadows()

    def _find_shadows(self) -> None:
        """Before the first pass, so that it makes the copies that the first step then writes."""
        self._shadows = {p: shadow_of(p) for group in self.param_groups for p in group["params"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of torch.optim.AdamW. Raises ValueError for an option that this class does not have."""
        for i, group in enumerate(state_dict["param_groups"]):
            for name in REFUSED:
                if group.get(name):
                    raise ValueError(
                        f"group {i} of the state_dict has {name}=True, allowed is False (optimizer='torch')"
                    )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clips, where there is a max_norm, and updates what has a gradient. Gradients stay as they are.

        closure: computes the loss again and returns it. In a CUDA graph a learning rate that is a number stays what it
        was at the capture.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler leaves here what gradients are still to be divided by, and whether there was an overflow.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if (update := self._begin(scale)) is not None:
            # After an overflow the step writes nothing, and what was not fresh before is not fresh then.
            written = [s for s in self._written if found_inf is None or s.is_fresh]
            self.grad_norm = update.finish(found_inf, self._reduced)
            for shadow in written:
                shadow.written()
            if hardware.is_capturing():
                self._forget_all_but(written)
        self._begun = None
        return loss

    def _forget_all_but(self, written: list[Shadow]) -> None:
        """Replays of a captured step change parameters without anybody counting it, and write these shadows only."""
        assert self._shadows is not None
        for p, shadow in self._shadows.items():
            if shadow is not None and all(shadow is not other for other in written):
                forget(shadow)
                self._shadows[p] = None

    @torch.no_grad()
    def measure_grad_norm(self) -> Tensor:
        """The norm of all gradients before clipping, a scalar on the device: to look at it before the step, which does
        not read the gradients for it again if they and the settings are the same.

        Raises ValueError without max_norm.
        """
        if self.max_norm is None:
            raise ValueError("max_norm is None, allowed are numbers above 0: without clipping no norm is computed")
        if (update := self._begin(None)) is None:
            return torch.zeros(())
        return (update.squares.sum() if self._reduced is None else self._reduced).sqrt()

    def _begin(self, scale: Tensor | None) -> ops.TritonAdamWUpdate | None:
        """The first launch, unless `measure_grad_norm` has made it. None where there are no gradients."""
        found = [(p, p.grad, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        active = [(p, g, i) for p, g, i in found if g is not None]
        if not active:
            return None
        settings = [_settings(group, active[0][0].device) for group in self.param_groups]
        numbers = [x if not isinstance(x, Tensor) else (x.data_ptr(), x._version) for s in settings for x in s]
        shadows = self._current_shadows([p for p, *_ in active])
        copies = [None if s is None else s.copy for s in shadows]
        begun = (*numbers, self.max_norm, *((id(p), _local(g).data_ptr(), g._version) for p, g, _ in active))
        begun += tuple(map(id, copies))
        if self._update is not None and scale is None and begun == self._begun:
            return self._update
        self._written = [s for s in shadows if s is not None]
        tensors = [self._member(p, g, copy) for (p, g, _), copy in zip(active, copies, strict=True)]
        members = tuple(
            (id(p), p.shape, p.dtype, i, None if c is None else c.dtype)
            for (p, _, i), c in zip(active, copies, strict=True)
        )
        if self._update is None or members != self._members:
            self._mesh = _mesh([p for p, _, _ in active], self.max_norm is not None)
            self._update, self._members = ops.TritonAdamWUpdate(tensors, [i for *_, i in active]), members
        self._update.begin(tensors, settings, self.max_norm, scale)
        self._reduced = None
        if self._mesh is not None and self.max_norm is not None:
            self._reduced = self._update.squares.sum()
            for dim, placement in enumerate(self._mesh[1]):
                if placement.is_shard():
                    dist.all_reduce(self._reduced, group=self._mesh[0].get_group(dim))
        self._begun = begun
        return self._update

    def _current_shadows(self, parameters: list[Tensor]) -> list[Shadow | None]:
        """Of each of them the shadow that this step writes, if it has one: those of one dtype."""
        assert self._shadows is not None
        found = [self._shadows.get(p) for p in parameters]
        dtype = next((s.copy.dtype for s in found if s is not None and s.copy is not None), torch.bfloat16)
        return [s if s is not None and s.fits(dtype) else None for s in found]

    def _member(self, p: Tensor, g: Tensor, copy: Tensor | None) -> ops.TritonAdamWMember:
        """What the kernels read and write of a parameter: memory of this rank."""
        own = self.state[p]
        if not own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            own["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            own["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if getattr(g, "placements", None) != getattr(p, "placements", None):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is placed {getattr(p, 'placements', 'whole')} and its gradient "
                f"{getattr(g, 'placements', 'whole')}, allowed is the same (optimizer='torch')"
            )
        local = _local(p)
        gradient = _like(_local(g), local) if g.layout == torch.strided else g
        moments = _local(own["exp_avg"]), _local(own["exp_avg_sq"])
        return ops.TritonAdamWMember(local, gradient, *moments, own["step"], copy)


def _settings(group: dict[str, Any], device: torch.device) -> ops.TritonAdamWSettings:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.device != device:
            if lr.device.type != "cpu":
                raise ValueError(
                    f"lr is on '{lr.device}', allowed are a number and a tensor on '{device}' or on the CPU"
                )
            lr = float(lr)
        elif lr.dtype != torch.float32:
            raise TypeError(f"lr is a tensor of {lr.dtype}, allowed are a number and a float32 tensor")
    for name in REFUSED:
        if group[name]:
            raise ValueError(f"{name} is True, allowed is False (optimizer='torch')")
    return ops.TritonAdamWSettings(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"])


def _local(t: Tensor) -> Tensor:
    """A DTensor's memory on this rank; others are all here."""
    kind: Any = type(t)
    if kind is Tensor or kind is torch.nn.Parameter or not hasattr(t, "to_local"):
        return t
    return t.to_local()


def _like(t: Tensor, like: Tensor) -> Tensor:
    """t, copied where it does not lie in memory as `like` does."""
    return t if t.stride() == like.stride() or t.shape != like.shape else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _mesh(tensors: list[Any], norm: bool) -> tuple[Any, Any] | None:
    """(mesh, placements) of parameters that ranks hold shards of, None where each holds all.

    Raises ValueError where a norm is wanted and they differ: their squares are sums over different ranks.
    """
    places: list[Any] = [(p.device_mesh, p.placements) if hasattr(p, "placements") else None for p in tensors]
    other = next((p for p in places if p != places[0]), places[0])
    if norm and other != places[0]:
        raise ValueError(
            f"max_norm is given and parameters are placed differently, {places[0]} and {other}, allowed is one "
            "placement of all (optimizer='torch')"
        )
    return places[0]
