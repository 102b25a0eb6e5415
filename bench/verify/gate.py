"""No numbers of wrong kernels: `fastgpt2 verify` runs before anything is measured."""

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
    """Whether verify is green on this device; prints its verdict, or all that it said where it is red."""
    print("verify:", end=" ", flush=True)
    green, said = (_here if device.type == "cuda" else _interpreted)(["--device", str(device)])
    if not green:
        print(f"red, so nothing is measured\n{said}", file=sys.stderr)
        return False
    print(said.strip().splitlines()[-1], flush=True)
    return True


def _here(arguments: list[str]) -> tuple[bool, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            green = verify.main(arguments) == 0
        except Exception:  # a compiler's and a driver's errors share no class
            green = False
            said.write(traceback.format_exc())
    torch.cuda.empty_cache()  # what is measured starts without it
    return green, said.getvalue()


def _interpreted(arguments: list[str]) -> tuple[bool, str]:
    """In a process of its own: that kernels are interpreted has to be said before they are imported."""
    # float16 takes as long again and is not trained in on a CPU
    command = [sys.executable, "-m", "fastgpt2.gpt2", "verify", *arguments, "--dtype", "float32"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode == 0, run.stdout + run.stderr * (run.returncode != 0)
