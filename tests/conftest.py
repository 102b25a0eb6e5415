"""What every test gets: Triton's interpreter where there is no GPU, poisoned fresh memory, one seed.

Set before Triton is imported: TRITON_INTERPRET is read when a kernel is decorated. Tests of compiled code therefore run
in processes of their own (see test_compiled.py).
"""

import fcntl
import os
import sys

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; read when PyTorch is imported

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis  # noqa: E402
import interpreter  # noqa: E402  (tests/interpreter.py)
import pytest  # noqa: E402

_ANY_SPEED = dict(
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[phase for phase in hypothesis.Phase if phase != hypothesis.Phase.explain],  # slower than all the others
)
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=25, database=None, **_ANY_SPEED)
hypothesis.settings.register_profile("long", derandomize=False, max_examples=1000, **_ANY_SPEED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if not HAS_GPU:
    # Not a fixture: modules may launch kernels while they are collected. Kept in a name: freeing it would undo it.
    MEND = interpreter.mended()
    MEND.__enter__()


def pytest_collection_modifyitems(items):
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if HAS_GPU:  # warned of because of what the tests do, not by the code under test
            for words in ("deterministic", "Synchronization debug mode", "TensorFloat32"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:.*{words}.*:UserWarning"))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned():
    """torch.empty and its kin give NaN (integers: the largest one), so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=HAS_GPU)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten():
    """Dynamo counts compilations of a function in the whole process: those of other tests would use up its limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a file that `make(path)` writes, once also where pytest runs in several processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared

    def made(name, make):
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                make(shared / name)
        return shared / name

    return made


@pytest.fixture(scope="module")
def quick_runs():
    """Runs without plots and samples, which are most of the time of a tiny one."""
    from fastgpt2.gpt2.training.run_folder import RunFolder
    from fastgpt2.gpt2.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "plot", lambda self: None)
        patch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="module")
def hf():
    """A tiny GPT2LMHeadModel with random weights, in eval mode. Not to be changed."""
    from hf_models import hf_gpt2

    return hf_gpt2().eval()


@pytest.fixture(scope="module")
def idx():
    """Token ids (2, T) for `hf`, as long as it can take."""
    from hf_models import TINY

    return torch.randint(0, TINY["vocab_size"], (2, TINY["n_positions"]), generator=torch.Generator().manual_seed(1))
