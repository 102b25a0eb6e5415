"""Launches through Triton's real way and a driver that does nothing, for test_frozen.py: run as a script, in a process
without TRITON_INTERPRET, it prints a JSON line of what it found.

python frozen_examples.py NAME        (a function below)
"""

import contextlib
import json
import random
import sys
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from fastgpt2.bench.audit.traffic import count_launches
from fastgpt2.bench.timing.no_device import last_launch, launches, no_device, write_down
from fastgpt2.kernels import _device, _frozen
from fastgpt2.kernels._frozen import Launch, planned

sys.path.insert(0, str(Path(__file__).parent))
from calls import CALLS  # noqa: E402
from strides import STRIDES, strided  # noqa: E402


@triton.jit(do_not_specialize=["P"])
def _example_kernel(a_ptr, b_ptr, c_ptr, stride, P, scale, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(a_ptr + offs * stride) * scale
    if b_ptr is not None:
        x += tl.load(b_ptr + offs)
    if EXTRA is not None:
        x += EXTRA
    tl.store(c_ptr + offs + P, x)


def _tensor(draw: random.Random, none: bool = True) -> torch.Tensor | None:
    if none and draw.random() < 0.2:
        return None
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16, torch.int64])
    return torch.empty(128, dtype=dtype)[draw.choice([0, 1, 2, 4, 8]) :]


def _arguments(draw: random.Random) -> tuple[tuple, tuple, dict]:
    """Tensors, numbers, options: of few kinds, so that equal ones come again."""
    tensors = (_tensor(draw, none=False), _tensor(draw), _tensor(draw, none=False))
    number = [1, 2, 15, 16, 32, 2**31 - 1, 2**31, True, False]
    numbers = (draw.choice(number), draw.choice(number), draw.choice([0.5, 1.0, 2, 1, 16]))
    extra = draw.choice([None, 0, 1, 1.0, True])
    early = draw.choice([False, True])  # an attribute of the launch
    return tensors, numbers, dict(EXTRA=extra, BLOCK=32, num_warps=draw.choice([1, 2]), launch_pdl=early)


BYTES = {"i1": 1, "u1": 1, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


def _by_triton(launch: Launch, tensors: tuple) -> tuple | None:
    """What Triton starts for a launch: function, grid, arguments. None for what it does not compile."""
    arguments = (*tensors, *launch.numbers)
    try:
        compiled = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options)
    except Exception:
        return None
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    write_down([8 if kind.startswith("*") else BYTES[kind] for kind in kinds])
    launch.kernel[launch.grid](*arguments, **launch.options)
    return last_launch()


def same_as_triton() -> dict:
    """Random launches, again and again in random order: each starts what Triton starts, frozen or not."""
    draw = random.Random(0)
    pool = [_arguments(draw) for _ in range(60)]
    launches = {}  # one for equal numbers and options, as plans are
    wrong, hits, kinds = 0, 0, set()
    with no_device():
        for _ in range(600):
            tensors = draw.choice(pool)[0]
            _, numbers, options = draw.choice(pool[:12])
            key = (numbers, *map(type, numbers), *options.values(), type(options["EXTRA"]))
            launch = launches.setdefault(key, Launch(_example_kernel, (3,), *numbers, **options))
            expected = _by_triton(launch, tensors)
            if expected is None:
                continue
            before = len(launch.frozen)
            launch(*tensors)
            hits += len(launch.frozen) == before
            wrong += last_launch() != expected
            kinds.add(expected[0])
    return dict(wrong=wrong, hits=hits, kinds=len(kinds))


def operators() -> dict:
    """Calls of operators that compile fast, in random order, with inputs of random strides and alignment, through warm
    plans: every launch is what Triton starts for the same arguments."""
    draw = random.Random(2)
    by_launch, wrong, hits = Launch.__call__, [], 0
    calls = [c for c in CALLS if c.op in ("add_layer_norm", "bias_gelu", "mlp", "token_position_embedding")]

    def checked(self, *tensors):
        nonlocal hits
        before = len(self.frozen)
        expected = _by_triton(self, tensors)
        by_launch(self, *tensors)
        hits += len(self.frozen) == before
        if last_launch() != expected:
            wrong.append(self.kernel.__name__)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return strided(x, draw.choice(STRIDES)).requires_grad_(x.requires_grad)

    with no_device(), mock.patch.object(Launch, "__call__", checked):
        for _ in range(16):
            call = draw.choice(calls)
            inputs = call.inputs(torch.float32, torch.device("cpu"))
            inputs = tuple(moved(x.detach().requires_grad_(x.requires_grad)) for x in inputs)
            for _ in range(2):
                call.results(inputs)
    return dict(wrong=wrong, hits=hits)


def plans_tell_numbers_apart() -> dict:
    """A plan is made anew for arguments that are equal but of another type, and for another machine."""
    made = []

    @planned
    def plan(*args):
        made.append(args)
        return args

    for args in ((1,), (True,), (1.0,), (1,), (2,), ((1, 2),), (None,), (1,)):
        plan(*args)
    same_machine = len(made)
    with mock.patch.object(_device, "sm_count", lambda device: 7):
        plan(1)
    return dict(made=same_machine, made_elsewhere=len(made) - same_machine)


def plain_road() -> dict:
    """How often Triton's own way is taken, out of three launches each, while somebody watches or changes something."""
    x = torch.empty(32)
    launch = Launch(_example_kernel, (1,), 1, 0, 2.0, EXTRA=None, BLOCK=32)
    seen = []

    def called(context) -> int:
        bind = JITFunction.__dict__["run"]
        before, runs = launches(), []
        with (
            context,
            mock.patch.object(_frozen, "_RUN", _counting(bind, runs)),
            mock.patch.object(JITFunction, "run", _counting(bind, runs)),
        ):
            _frozen._RUN = JITFunction.run
            for _ in range(3):
                launch(x, None, x)
        seen.append(launches() - before)
        return len(runs)

    with no_device():
        launch(x, None, x)
        found = dict(
            nothing=called(contextlib.nullcontext()),
            enter_hook=called(_hook("launch_enter_hook")),
            exit_hook=called(_hook("launch_exit_hook")),
            knob=called(_knob(knobs.runtime, "debug", True)),
            compilation=called(_knob(knobs.compilation, "instrumentation_mode", "")),
            pre_run_hook=called(mock.patch.object(_example_kernel, "pre_run_hooks", [lambda *a, **k: None])),
        )
    return dict(runs=found, launches=seen)


def counted() -> dict:
    """Launches counted by Triton's hook: every one, frozen ones too, beside a hook that was there before."""
    x, seen = torch.empty(32), []
    launch = Launch(_example_kernel, (1,), 1, 0, 2.0, EXTRA=None, BLOCK=32)
    with no_device(), _hook("launch_enter_hook", seen.append):
        with count_launches() as first:
            launch(x, None, x)
            launch(x, None, x)
    knobs_left = len(vars(knobs.runtime)), len(getattr(knobs.runtime.launch_enter_hook, "calls", ()))
    with no_device():
        launch(x, None, x)
        before = len(launch.frozen), launches()
        launch(x, None, x)
    frozen = len(launch.frozen) == before[0] == 1 and launches() == before[1] + 1
    return dict(names=[entry.name for entry in first], others=len(seen), knobs_left=knobs_left, frozen=frozen)


def _counting(run, runs):
    def counted(self, *args, **kwargs):
        runs.append(self)
        return run(self, *args, **kwargs)

    return counted


@contextlib.contextmanager
def _hook(name, hook=lambda metadata: None):
    chain = getattr(knobs.runtime, name)
    if chain is None:  # Triton 3.4, where it is the one hook
        with _knob(knobs.runtime, name, hook):
            yield
        return
    chain.add(hook)
    yield
    chain.remove(hook)


@contextlib.contextmanager
def _knob(group, name, value):
    setattr(group, name, value)
    yield
    del vars(group)[name]


def patched_run() -> dict:
    """A tool that puts its own `JITFunction.run` in place sees every launch."""
    runs = []
    x = torch.empty(32)
    launch = Launch(_example_kernel, (1,), 1, 0, 2.0, EXTRA=None, BLOCK=32)
    with no_device():
        launch(x, None, x)
        launch(x, None, x)
        with mock.patch.object(JITFunction, "run", _counting(JITFunction.run, runs)):
            launch(x, None, x)
            launch(x, None, x)
    return dict(runs=len(runs))


def another_triton() -> dict:
    """Where a compiled kernel is not what this code knows, or the version was not tried, launches are Triton's."""
    x = torch.empty(32)
    with no_device():
        strange = Launch(_example_kernel, (1,), 1, 0, 2.0, EXTRA=None, BLOCK=32)
        with mock.patch.object(_frozen, "TRIED", False):
            untried = Launch(_example_kernel, (1,), 1, 0, 2.0, EXTRA=None, BLOCK=32)
        with mock.patch.object(Launch, "_freeze", lambda self, compiled, n: _frozen_of(self, object(), n)):
            strange(x, None, x)
            before = launches()
            strange(x, None, x)
        untried(x, None, x)
        untried(x, None, x)
        return dict(frozen=len(strange.frozen), untried=untried.frozen is None, launches=launches() - before)


_frozen_of = Launch._freeze

if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
