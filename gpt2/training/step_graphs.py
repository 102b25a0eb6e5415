"""Forward and backward of a training step as CUDA graphs inside autograd: two launches instead of hundreds.

    graphs = StepGraphs(forward, model, {"idx": idx, "targets": targets})   # forward(**inputs) -> (logits, loss)
    logits, loss = graphs(idx=idx, targets=targets)                         # replays the forward
    (loss / n).backward()                                                   # replays the backward with gradient 1 / n

The arithmetic is unchanged, and everything after the model (accumulation, hooks on parameters, DDP's buckets) is
PyTorch's own: for autograd, a replay is one node that returns the gradient of each parameter. If `cuts` names blocks,
backward is cut into several graphs there. The gradients of the last blocks are then returned, and DDP reduces them,
while the GPU computes those of the earlier blocks.

A replay overwrites the results of the previous one in the graphs' memory. Losses, logits and gradients are therefore
returned as copies, except for gradients that autograd adds to `p.grad` at once. (`torch.cuda.make_graphed_callables`
returns gradients without a copy: PyTorch uses them as `p.grad`, and the next replay overwrites it.)

Source: PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.ops import launched_by_graph
from fastgpt2.gpt2.shadow import captured

Out = TypeVar("Out")
ONLY_ONCE = (
    "whose graphs hold the loss's backward alone, once after each forward: take such a step from a copy of the model "
    "(copy.deepcopy), or after fastgpt2.gpt2.training.graphed.release(model)"
)
WARM_UP = 2  # passes before the capture, which compile kernels and make allocations that a capture may not make


class Recorder:
    """Captures graphs on one device. They share one memory pool and are replayed in the order of their capture.

    pool_bytes: GPU memory that the graphs hold, activations included.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool_bytes = device, 0
        # Separate streams for warm-up and capture, so that a library allocates its workspace for the capture's stream
        # in the graphs' memory pool.
        self.side, self.stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cuda"

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """Restores the state of the device's generator at the end, also after an error."""
        before = torch.cuda.get_rng_state(self.device)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(before, self.device)

    def warm_up(self, work: Callable[[], Out]) -> tuple[Out, bool]:
        """(what work returns, whether it drew random numbers). Runs on a side stream, as a capture does."""
        before = torch.cuda.get_rng_state(self.device)
        with torch.cuda.device(self.device):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                out = work()
            torch.cuda.current_stream().wait_stream(self.side)
        return out, not torch.equal(before, torch.cuda.get_rng_state(self.device))

    def capture(self, work: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
        """(a function that replays work, the tensors that work returned, which each replay overwrites)."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self.device)
        # "thread_local", because other threads (a loader that pins memory, NCCL's watchdog) may meanwhile make calls
        # that are forbidden during a capture.
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), capture:
            out = work()
        self.pool_bytes += torch.cuda.memory_reserved(self.device) - reserved

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, out


@dataclass
class Segment:
    """Backward through consecutive blocks. After a replay, `gradients` holds the gradients of `parameters`."""

    replay: Callable[[], None]
    parameters: list[nn.Parameter]
    gradients: list[Tensor]


class Turn:
    """One replayed forward, whose activations are in the graphs' memory until its backward has run.

    left: the number of segments whose backward has not run. versions: the parameters' versions at the forward.
    """

    def __init__(self, left: int, versions: list[int]):
        self.left, self.versions = left, versions


class StepGraphs:
    """The graphs of a step, captured in the constructor. Inputs must keep their shapes, parameters their memory, and
    Python code is not run again; `Graphed` checks for changes.

    Each backward belongs to the preceding forward and runs once. `busy` is True while a backward is outstanding.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor | None, Tensor]],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        cuts: Sequence[nn.Module] = (),
        redraws: bool = False,
    ):
        """forward: computes (logits or None, scalar loss) with `module` from tensors like `inputs`, under the current
            autocast state, without waiting for the device. It reads nothing else that changes, except random numbers.
        cuts: the blocks of the model, in order, before which backward is cut.
        redraws: whether backward recomputes parts of the forward, which may draw random numbers.

        Leaves the random number generator's state unchanged. Raises RuntimeError if something cannot be captured or
        memory runs out.
        """
        self._compute, self._module, self._cuts = forward, module, cuts
        self.inputs = {name: t.clone() for name, t in inputs.items()}
        # The graphs read the parameters' memory through separate leaf tensors, which have no hooks and whose gradients
        # no other code, such as DDP, waits for on another stream.
        self._leaves = {p: nn.Parameter(p.detach()) for p in module.parameters() if p.requires_grad}
        if not self._leaves:
            raise RuntimeError("no parameter requires a gradient")
        self.recorder = Recorder(next(iter(self._leaves)).device)
        self._turn: Callable[[], Turn | None] = lambda: None
        self._tape: list[tuple[list[Tensor], list[Tensor]]] = []
        try:
            with launched_by_graph(), captured(self._leaves) as shadows, self.recorder.random_numbers_kept():
                self._upstream = self._warm_up(redraws)
                self._replay_forward, (self.logits, self.loss) = self.recorder.capture(self._forward)
                self.segments = self._capture_backward()
            self._shadows = list(shadows.read.values())  # the graphs read their memory
        finally:
            self._tape = []  # frees the activations that it holds

    @property
    def pool_bytes(self) -> int:
        """GPU memory in bytes that is held between steps, besides gradients."""
        return self.recorder.pool_bytes

    @property
    def busy(self) -> bool:
        """Whether the last forward may still need its activations for a backward. The next forward overwrites them."""
        turn = self._turn()
        return turn is not None and turn.left > 0

    def __call__(self, **inputs: Tensor) -> tuple[Tensor | None, Tensor]:
        """-> (logits or None, loss), as copies. Raises RuntimeError if `busy`."""
        if self.busy:
            raise RuntimeError(
                "the previous forward still needs its backward: this one would overwrite its activations"
            )
        for name, own in self.inputs.items():
            own.copy_(inputs[name])
        for shadow, copy in self._shadows:
            shadow.refreshed(copy)
        self._replay_forward()
        turn = Turn(len(self.segments), self._versions())
        self._turn = weakref.ref(turn)
        below = None
        for i, segment in enumerate(self.segments):
            below, logits = _Replay.apply(self, i, turn, below, *segment.parameters)
        assert below is not None
        return logits, below  # the last segment returns the loss

    def replay_backward(self, i: int, turn: Turn, upstream: Tensor | None) -> None:
        """Replays the backward of segment i. The last one comes first and needs `upstream`, the loss's gradient."""
        if turn.left != i + 1:
            raise RuntimeError(f"backward goes through a graphed step a second time, {ONLY_ONCE}")
        if upstream is not None:
            if turn.versions != self._versions():
                raise RuntimeError("a parameter was changed in place between a graphed step's forward and its backward")
            self._upstream.copy_(upstream)
        self.segments[i].replay()
        turn.left = i

    def _versions(self) -> list[int]:
        return [p._version for p in self._leaves]

    # ----------------------------------------------------------------------------------------------------- capture

    def _warm_up(self, redraws: bool) -> Tensor:
        """-> the tensor into which the gradient of the loss is copied before a replay."""
        upstream = None
        for _ in range(WARM_UP):
            (_, loss), drew = self.recorder.warm_up(self._forward)
            if drew and redraws:
                raise RuntimeError(
                    "recompute repeats dropout in backward, and graphs cannot draw the same numbers again"
                )
            upstream = torch.ones_like(loss) if upstream is None else upstream
            above: Sequence[Tensor | None] = [upstream]
            while self._tape:
                joints = len(self._tape[-1][1])
                above = self.recorder.warm_up(functools.partial(self._backward, above))[0][:joints]
        assert upstream is not None
        return upstream

    def _capture_backward(self) -> list[Segment]:
        segments: list[Segment] = []
        above: Sequence[Tensor | None] = [self._upstream]
        while self._tape:
            joints = len(self._tape[-1][1])
            replay, found = self.recorder.capture(functools.partial(self._backward, above))
            above = found[:joints]
            pairs = [(p, g) for p, g in zip(self._leaves, found[joints:], strict=True) if g is not None]
            segments.insert(0, Segment(replay, [p for p, _ in pairs], [g for _, g in pairs]))
        return segments

    def _forward(self) -> tuple[Tensor | None, Tensor]:
        """-> (logits or None, loss). Records for every segment, from the first block on: (the tensors that it passes to
        the next segment, the leaves at which it received those of the previous one)."""
        joints: list[Tensor] = []
        self._tape = []

        def cut(stream: Any) -> Any:
            nonlocal joints
            inner = [t for t in stream if isinstance(t, Tensor) and t.grad_fn is not None]
            if not inner:
                return stream  # no parameter of the blocks below requires a gradient
            self._tape.append((inner, joints))
            leaves = {id(t): t.detach().requires_grad_() for t in inner}
            joints = list(leaves.values())
            return type(stream)(*(leaves.get(id(t), t) for t in stream))

        with self._leaves_in_place(), _cut_before(self._cuts, cut), _no_autocast_cache():
            logits, loss = self._compute(**self.inputs)
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            raise RuntimeError("what the model returns has no scalar loss with a gradient in second place")
        self._tape.append(([loss], joints))
        return None if logits is None else logits.detach(), loss.detach()

    def _backward(self, upstream: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Takes the last segment off the tape and computes its backward.

        upstream: the gradients of the tensors that it passed on -> the gradients of those that it received, followed by
        those of all leaves, None for leaves that it does not use.
        """
        given, joints = self._tape.pop()
        pairs = [(t, g) for t, g in zip(given, upstream, strict=True) if g is not None]
        with self._leaves_in_place(), torch.autocast(given[0].device.type, enabled=False):
            return torch.autograd.grad(
                [t for t, _ in pairs], [*joints, *self._leaves.values()], [g for _, g in pairs], allow_unused=True
            )

    @contextlib.contextmanager
    def _leaves_in_place(self) -> Iterator[None]:
        """Inside, the leaves replace the module's parameters."""
        modules = [m._parameters for m in self._module.modules()]
        places = [(own, name, p) for own in modules for name, p in own.items() if p is not None and p in self._leaves]
        try:
            for own, name, p in places:
                own[name] = self._leaves[p]
            yield
        finally:
            for own, name, p in places:
                own[name] = p


class _Replay(torch.autograd.Function):
    """The autograd node of one segment. The loss depends on the last segment's node, and each node on the previous one.
    Autograd therefore runs them one after the other and passes on the gradients of each before it runs the next."""

    @staticmethod
    def forward(ctx, graphs: StepGraphs, i: int, turn: Turn, below: Tensor | None, *parameters: nn.Parameter):  # type: ignore[override]
        ctx.graphs, ctx.i, ctx.turn, ctx.is_first = graphs, i, turn, below is None
        ctx.set_materialize_grads(False)
        if i + 1 < len(graphs.segments):
            return graphs.loss.new_zeros(()), None
        return graphs.loss.clone(), None if graphs.logits is None else graphs.logits.clone()

    @staticmethod
    def backward(ctx, upstream, of_logits):  # type: ignore[override]
        if of_logits is not None:
            raise RuntimeError(f"a gradient comes through the logits of a graphed step, {ONLY_ONCE}")
        if torch.is_grad_enabled():
            raise RuntimeError(f"create_graph asks for the backward of a graphed step's backward, {ONLY_ONCE}")
        ctx.graphs.replay_backward(ctx.i, ctx.turn, upstream)
        segment = ctx.graphs.segments[ctx.i]
        nodes = [node for node, _ in ctx.next_functions][0 if ctx.is_first else 1 :]
        return None, None, None, None, *_given_out(segment, nodes)


def _given_out(segment: Segment, nodes: Sequence[Any]) -> list[Tensor]:
    """The gradients of a segment: the graphs' memory itself if autograd adds it to `p.grad` at once, else copies."""
    found = list(segment.gradients)
    kept = [
        k
        for k, (p, node) in enumerate(zip(segment.parameters, nodes, strict=True))
        if p.grad is None or p._backward_hooks or not _accumulates(node)
    ]
    if kept:
        copies = [torch.empty_like(found[k]) for k in kept]
        torch._foreach_copy_(copies, [found[k] for k in kept])  # copies many tensors in a few launches
        for k, copy in zip(kept, copies, strict=True):
            found[k] = copy
    return found


def _accumulates(node: Any) -> bool:
    """Whether the current backward ends in the AccumulateGrad node `node`, as loss.backward() does. torch.autograd.grad
    returns gradients to its caller instead."""
    if not hasattr(torch._C, "_will_engine_execute_node"):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for a leaf under torch.autograd.grad
        return False


@contextlib.contextmanager
def _cut_before(blocks: Sequence[Any], cut: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, each of the blocks applies `cut` to the incoming stream before it extends it."""

    def extend(block: Any, stream: Any, context: Any) -> Any:
        return type(block).extend(block, cut(stream), context)

    try:
        for block in blocks:
            block.extend = functools.partial(extend, block)
        yield
    finally:
        for block in blocks:
            del block.extend


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Inside, autocast does not cache casts of weights. A cached copy from before the capture would be outdated in
    replays, and one made during the capture is in memory that must not be read afterwards."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
