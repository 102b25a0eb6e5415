"""The roofline model: a lower bound that follows from bytes, FLOPs and data sheets, and says that it is a model."""

import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases.registry import operations
from fastgpt2.bench.report import roofline
from fastgpt2.bench.report.roofline import Work
from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.hardware import Gpu

GPU = Gpu("made up", bf16_flops=100.0, bytes_per_s=10.0)


def test_time_is_bound_by_the_slower_of_memory_and_products():
    assert Work("copy", bytes=50, flops=100).least_s(GPU) == 5.0
    assert Work("product", bytes=50, flops=900, times=2).least_s(GPU) == 18.0
    assert roofline.least_ms(50, 0, GPU, torch.float32) == 5000.0
    assert roofline.least_ms(50, 9, GPU, torch.float32) is None, "that peak is another"
    assert roofline.least_ms(50, 9, None, torch.bfloat16) is None


def test_a_step_multiplies_what_the_model_has():
    """6 FLOPs a weight and token, and attention's seven products over what is visible."""
    config, B, T = GPTConfig.preset("gpt2", vocab_size=50304), 2, 1024
    work = {w.name: w for w in roofline.step_work(config, B, T)}
    flops = sum(w.flops * w.times for w in work.values())
    matrices = 12 * 12 * 768**2 + 50304 * 768
    assert flops == 6 * matrices * B * T + 12 * 7 * B * 12 * T * (T + 1) * 64
    assert 0.8 < flops / (config.flops_per_token(T) * B * T) < 1.0, "the usual formula does not discount causality"


def test_a_step_moves_at_least_its_state():
    config = GPTConfig.preset("gpt2")
    work = {w.name: w for w in roofline.step_work(config, 1, 64)}
    assert work["AdamW with clipping"].bytes == 28 * config.num_params()
    assert work["add_layer_norm"].times == 24 and work["causal_attention"].times == 12


@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl"])
def test_a_faster_gpu_never_takes_longer(size):
    slow, fast = (hardware.gpu_by_name(f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "B200"))
    assert slow and fast
    config = GPTConfig.preset(size)
    assert roofline.step_ms(config, 4, 1024, fast) < roofline.step_ms(config, 4, 1024, slow)
    assert roofline.step_ms(config, 4, 1024, fast) < roofline.step_ms(config, 8, 1024, fast)


@pytest.mark.parametrize(
    ("name", "bytes_per_s"),
    [
        ("NVIDIA A100-SXM4-40GB", 1555e9), ("NVIDIA A100-SXM4-80GB", 2039e9), ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA H100 PCIe", 2000e9), ("NVIDIA H200", 4800e9), ("NVIDIA GeForce RTX 4090", 1008e9),
        ("NVIDIA H200 NVL", 4800e9), ("NVIDIA B200", 8000e9), ("AMD Instinct MI300X", 5300e9),
    ],
)  # fmt: skip
def test_devices_are_found_by_the_names_that_drivers_give(name, bytes_per_s):
    found = hardware.gpu_by_name(name)
    assert found is not None and found.bytes_per_s == bytes_per_s


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA X1", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100X",
    ],
)  # fmt: skip
def test_unknown_hardware_is_unknown(name):
    assert hardware.gpu_by_name(name) is None and hardware.gpu(torch.device("cpu")) is None


def test_every_figure_says_that_it_is_a_model(capsys):
    headers, rows = roofline.table()
    assert all("model" in header for header in headers) and len(headers) == 1 + len(roofline.SHOWN)
    shown = " ".join(row[0] for row in rows)
    assert all(op in shown for op in operations())
    assert sum("training step" in row[0] for row in rows) == 4
    assert bench.main(["roofline"]) == 0
    assert "nothing measured" in capsys.readouterr().out
