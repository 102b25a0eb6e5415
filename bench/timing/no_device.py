"""Triton's real launch code on a machine without a GPU, with a CUDA driver whose launch function does nothing.

    with no_device():                          # in a process without TRITON_INTERPRET
        y = layer_norm(x, weight)              # CPU tensors; y is uninitialized
    launches()                                 # how many launches there were

Triton compiles the kernels and its launcher as usual and calls them through a replacement for libcuda.so.1, whose
source is below and which the C compiler that Triton needs anyway builds. So the host does all its work, and no device
does any.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastgpt2.kernels import _device, _matmul

ARCHITECTURE = 90
MULTIPROCESSORS = 132

# The functions that Triton's driver.c and its launcher call; all succeed. Attributes have their numbers from cuda.h.
LIBCUDA = """
#include <stdint.h>
#include <stddef.h>
#include <string.h>
long launches = 0, functions = 0, last_function = 0;
unsigned last_config[8];            /* grid, block, shared memory, number of attributes */
int sizes[64], n_sizes = 0;         /* of the arguments to write down */
unsigned char last_arguments[512];
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;           /* threads of a warp */
    case 12: *value = 65536; break;        /* registers of a block */
    case 16: *value = 132; break;          /* multiprocessors */
    case 75: *value = 9; break;            /* compute capability */
    case 97: *value = 227 * 1024; break;   /* shared memory that a block may ask for */
    default: *value = 0;
  }
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)++functions;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  unsigned char *end = last_arguments;
  launches++;
  last_function = (long)function;
  memcpy(last_config, config, 7 * sizeof(unsigned));
  last_config[7] = ((const unsigned *)config)[12]; /* behind the stream and a pointer to the attributes */
  for (int i = 0; i < n_sizes; end += sizes[i++]) memcpy(end, arguments[i], sizes[i]);
  return 0;
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    """The replacement, loaded under the name by which Triton's launcher looks for the real library."""
    folder = Path(tempfile.mkdtemp(prefix="fastgpt2-libcuda-"))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(LIBCUDA, encoding="utf-8")
    compiler = os.environ.get("CC", "cc")
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([compiler, str(source), *flags], check=True, capture_output=True)
    (folder / "libcuda.so").symlink_to(library)  # what Triton's launchers of 3.5 and before are linked with
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def launches() -> int:
    """The number of launches so far in this process."""
    return ctypes.c_long.in_dll(_library(), "launches").value


def write_down(sizes: Sequence[int]) -> None:
    """From now on, `last_launch` returns the first arguments of a launch; sizes: how many bytes each of them has."""
    library = _library()
    (ctypes.c_int * 64).in_dll(library, "sizes")[: len(sizes)] = list(sizes)
    ctypes.c_int.in_dll(library, "n_sizes").value = len(sizes)


def last_launch() -> tuple[int, list[int], bytes]:
    """-> (function, [grid, block, shared memory, number of attributes], the bytes of its arguments)."""
    library = _library()
    n = sum((ctypes.c_int * 64).in_dll(library, "sizes")[: ctypes.c_int.in_dll(library, "n_sizes").value])
    function = ctypes.c_long.in_dll(library, "last_function").value
    config = (ctypes.c_uint * 8).in_dll(library, "last_config")
    return function, list(config), bytes((ctypes.c_ubyte * 512).in_dll(library, "last_arguments")[:n])


@functools.cache
def _driver():
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class NoDevice(CudaDriver):
        """Triton's CUDA driver without its questions to PyTorch about the current device."""

        def __init__(self):
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    return NoDevice()


def _check_device(*tensors: Tensor, instead: str = "") -> None:
    """Does the same work as `_device.check_device` does for tensors on a GPU."""
    index = tensors[0].get_device()
    any([t.get_device() != index for t in tensors])


def _float32_mm(a: Tensor, b: Tensor) -> Tensor:
    """A CPU has no product of 16-bit matrices into fp32. A call of another product of PyTorch's takes its place."""
    torch.mm(a, b)
    return torch.empty(a.shape[0], b.shape[1])


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Inside, kernels launched on CPU tensors compute nothing. Raises RuntimeError under TRITON_INTERPRET."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("no_device: kernels decorated under TRITON_INTERPRET are never launched; unset it")
    _library()
    answers: dict[str, Any] = dict(
        check_device=_check_device,
        capability=lambda device: divmod(ARCHITECTURE, 10),
        sm_count=lambda device: MULTIPROCESSORS,
        mixed_matmul=lambda device: "mm",
    )
    before = dict(vars(driver))  # not driver.active: reading it fails without a GPU
    driver.set_active(_driver())
    products: dict[str, Any] = dict(_float32_mm=_float32_mm, _widening_matmul=lambda a, b, out: torch.mm(a, b))
    try:
        with mock.patch.multiple(_device, **answers), mock.patch.multiple(_matmul, **products):
            yield
    finally:
        vars(driver).update(before)
