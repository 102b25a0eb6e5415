"""No numbers of wrong kernels: `fastgpt2 verify` runs before anything is measured."""

from __future__ import annotations

import functools
import subprocess
import sys

import torch


@functools.cache
def verified(device: torch.device) -> bool:
    """Whether verify is green on this device; prints its verdict, or all that it said where it is red.

    It runs once, in a process of its own: without a GPU kernels are interpreted, which has to be said before they are
    imported.
    """
    command = [sys.executable, "-m", "fastgpt2.gpt2", "verify", "--device", str(device)]
    if device.type != "cuda":
        command += ["--dtype", "float32"]  # float16 takes as long again and is not trained in on a CPU
    print("verify:", end=" ", flush=True)
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(f"red, so nothing is measured\n{run.stdout}{run.stderr}", file=sys.stderr)
        return False
    print(run.stdout.strip().splitlines()[-1], flush=True)
    return True
