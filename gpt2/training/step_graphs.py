"""Forward and backward of a training step as CUDA graphs behind autograd: two launches in place of hundreds.

    graphs = StepGraphs(forward, model, {"idx": idx, "targets": targets})   # forward(**inputs) -> (logits, loss)
    logits, loss = graphs(idx=idx, targets=targets)                         # replays the forward
    (loss / n).backward()                                                   # replays the backward, of this upstream

The arithmetic is the same, and what comes after the model (accumulation, hooks on parameters, DDP's buckets) is
PyTorch's own: to autograd a replay is one node that gives each parameter its gradient. Where `cuts` names blocks,
backward is a graph for each run of blocks between them, so that gradients of the last blocks are handed on, and DDP
reduces them, while the GPU computes those of the blocks before.

The graphs' memory is theirs: what a replay leaves there stays until the next one. So losses, logits and gradients are
given out as copies, but for gradients that autograd adds to `p.grad` at once. (`torch.cuda.make_graphed_callables`
gives gradients out as they lie: PyTorch takes them as `p.grad`, and the next replay writes into it.)

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

Out = TypeVar("Out")
ONLY_ONCE = (
    "whose graphs hold the loss's backward alone, once after each forward: take such a step from a copy of the model "
    "(copy.deepcopy), or after fastgpt2.gpt2.training.graphed.release(model)"
)
WARM_UP = 2  # passes that compile, and allocate what a capture may not


class Recorder:
    """Captures on one device; its graphs share their memory and are replayed in the order of their capture.

    `pool_bytes`: GPU memory that they hold while they live, activations included.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool_bytes = device, 0
        # Not one stream for both: a library's work space for the captures' stream is then in the captures' memory.
        self.side, self.stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cuda"

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """After it, also after an error, the device's generator is where it was."""
        before = torch.cuda.get_rng_state(self.device)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(before, self.device)

    def warm_up(self, work: Callable[[], Out]) -> tuple[Out, bool]:
        """(what work returns, whether it drew random numbers), run beside the current stream as a capture is."""
        before = torch.cuda.get_rng_state(self.device)
        with torch.cuda.device(self.device):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                out = work()
            torch.cuda.current_stream().wait_stream(self.side)
        return out, not torch.equal(before, torch.cuda.get_rng_state(self.device))

    def capture(self, work: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
        """(a replay of work, the memory into which each replay writes what work returns)."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self.device)
        # Other threads (a loader that pins memory, NCCL's watchdog) may meanwhile do what a capture may not.
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
    """Backward through a run of blocks: after a replay, `gradients` are those of `parameters`."""

    replay: Callable[[], None]
    parameters: list[nn.Parameter]
    gradients: list[Tensor]


class Turn:
    """One forward, whose activations lie in the graphs' memory. left: segments whose backward has not run; versions: of
    the parameters then."""

    def __init__(self, left: int, versions: list[int]):
        self.left, self.versions = left, versions


class StepGraphs:
    """Captures when it is made. Inputs keep their shapes, parameters their memory, and Python's state is not looked at
    again: `Graphed` watches over all that.

    A backward belongs to the forward before it and runs once; `busy` says that one is awaited.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor | None, Tensor]],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        cuts: Sequence[nn.Module] = (),
        redraws: bool = False,
    ):
        """forward: computes (logits or None, scalar loss) with `module`, from tensors like `inputs`, under the autocast
        state that is set now; waits for no device. Nothing else that it reads changes, but for random numbers.

        cuts: blocks of the model, in their order, before which backward is cut. redraws: backward computes again what
            forward drew random numbers for.
        Leaves random numbers where they were. Raises RuntimeError for what cannot be captured or takes too much memory.
        """
        self._compute, self._module, self._cuts = forward, module, cuts
        self.inputs = {name: t.clone() for name, t in inputs.items()}
        # The graphs read the parameters' memory through leaves of their own, which nobody has put a hook on and whose
        # gradients nobody, like DDP, waits for on another stream.
        self._leaves = {p: nn.Parameter(p.detach()) for p in module.parameters() if p.requires_grad}
        if not self._leaves:
            raise RuntimeError("no parameter requires a gradient")
        self.recorder = Recorder(next(iter(self._leaves)).device)
        self._turn: Callable[[], Turn | None] = lambda: None
        self._tape: list[tuple[list[Tensor], list[Tensor]]] = []
        try:
            with launched_by_graph(), self.recorder.random_numbers_kept():
                self._upstream = self._warm_up(redraws)
                self._replay_forward, (self.logits, self.loss) = self.recorder.capture(self._forward)
                self.segments = self._capture_backward()
        finally:
            self._tape = []  # what it holds are activations

    @property
    def pool_bytes(self) -> int:
        """GPU memory that is held between steps, beside gradients."""
        return self.recorder.pool_bytes

    @property
    def busy(self) -> bool:
        """Whether a forward's backward may still come, which the next forward would spoil."""
        turn = self._turn()
        return turn is not None and turn.left > 0

    def __call__(self, **inputs: Tensor) -> tuple[Tensor | None, Tensor]:
        """-> (logits or None, loss), copies. Raises RuntimeError where `busy`."""
        if self.busy:
            raise RuntimeError(
                "the forward before has not had its backward yet, whose activations this would overwrite"
            )
        for name, own in self.inputs.items():
            own.copy_(inputs[name])
        self._replay_forward()
        turn = Turn(len(self.segments), self._versions())
        self._turn = weakref.ref(turn)
        below = None
        for i, segment in enumerate(self.segments):
            below, logits = _Replay.apply(self, i, turn, below, *segment.parameters)
        assert below is not None
        return logits, below  # the last one's is the loss

    def replay_backward(self, i: int, turn: Turn, upstream: Tensor | None) -> None:
        """Of segment i: the last one first. upstream: the gradient of the loss, for the last one."""
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
        """-> where the gradient of the loss is put before a replay."""
        upstream = None
        for _ in range(WARM_UP):
            (_, loss), drew = self.recorder.warm_up(self._forward)
            if drew and redraws:
                raise RuntimeError("recompute computes dropout a second time, with numbers that no graph draws again")
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
        """-> (logits or None, loss), and on the tape for every segment, first block first: (what it gives to the one
        above, what it got from the one below)."""
        joints: list[Tensor] = []
        self._tape = []

        def cut(stream: Any) -> Any:
            nonlocal joints
            inner = [t for t in stream if isinstance(t, Tensor) and t.grad_fn is not None]
            if not inner:
                return stream  # nothing below takes gradients
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
        """Takes a segment off the tape; upstream: gradients of what it gives to the one above -> gradients of what it
        got from the one below, then of all leaves, None for those that it does not use."""
        given, joints = self._tape.pop()
        pairs = [(t, g) for t, g in zip(given, upstream, strict=True) if g is not None]
        with self._leaves_in_place(), torch.autocast(given[0].device.type, enabled=False):
            return torch.autograd.grad(
                [t for t, _ in pairs], [*joints, *self._leaves.values()], [g for _, g in pairs], allow_unused=True
            )

    @contextlib.contextmanager
    def _leaves_in_place(self) -> Iterator[None]:
        """Inside, the module computes with the leaves."""
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
    """One segment. The loss hangs on the last one, which hangs on the one before: so autograd runs them in turn, and
    hands the gradients of each on before it goes to the next."""

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
    """Gradients: the graph's own memory where autograd adds it to `p.grad` at once, else copies, which are kept."""
    found = list(segment.gradients)
    kept = [
        k
        for k, (p, node) in enumerate(zip(segment.parameters, nodes, strict=True))
        if p.grad is None or p._backward_hooks or not _accumulates(node)
    ]
    if kept:
        copies = [torch.empty_like(found[k]) for k in kept]
        torch._foreach_copy_(copies, [found[k] for k in kept])  # in a few launches
        for k, copy in zip(kept, copies, strict=True):
            found[k] = copy
    return found


def _accumulates(node: Any) -> bool:
    """Whether the backward that runs ends in AccumulateGrad `node`, as loss.backward() does. torch.autograd.grad gives
    gradients to its caller."""
    if not hasattr(torch._C, "_will_engine_execute_node"):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what it says of a leaf under torch.autograd.grad
        return False


@contextlib.contextmanager
def _cut_before(blocks: Sequence[Any], cut: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, each block extends what `cut` makes of the stream that comes to it."""

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
    """Inside, autocast casts weights anew: a copy from before is of weights that have changed since, and one made in
    a capture is in no memory that may be read after it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
