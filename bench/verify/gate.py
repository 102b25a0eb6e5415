"""`fastgpt2 verify` runs before anything is measured, so that no numbers of wrong kernels are printed."""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
import traceback

import torch

from fastgpt2.bench.verify import verify


@functools.cache
def verified(device: torch.device) -> bool:
    """Whether verify succeeds on this device. Prints its last line, or all of its output where it fails. Runs once a
    process."""
    print("verify:", end=" ", flush=True)
    green, said = (_here if device.type == "cuda" else _interpreted)(["--device", str(device)])
    if not green:
        print(f"failed, so nothing is measured\n{said}", file=sys.stderr)
        return False
    print(said.strip().splitlines()[-1], flush=True)
    return True


def _here(arguments: list[str]) -> tuple[bool, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            green = verify.main(arguments) == 0
        except Exception:  # errors of compilers and drivers have no common class
            green = False
            said.write(traceback.format_exc())
    torch.cuda.empty_cache()  # verify's memory is not part of what is measured
    return green, said.getvalue()


def _interpreted(arguments: list[str]) -> tuple[bool, str]:
    """In a process of its own, because TRITON_INTERPRET must be set before kernels are imported."""
    # without float16, which would take as long again and in which nobody trains on a CPU
    command = [sys.executable, "-m", "fastgpt2.gpt2", "verify", *arguments, "--dtype", "float32"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode == 0, run.stdout + run.stderr * (run.returncode != 0)
