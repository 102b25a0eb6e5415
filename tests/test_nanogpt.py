"""The calls that nanoGPT's train.py, sample.py and bench.py make, on our GPT and GPTConfig in place of its model.py."""

import math

import pytest
import torch
from hf_models import hf_gpt2, write_folder

from fastgpt2 import GPT, GPTConfig

BATCH, BLOCK, VOCAB = 4, 16, 37
CHECKPOINTED = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Counting modulo VOCAB from anywhere: easy to learn."""
    rows = (torch.randint(VOCAB, (BATCH, 1), generator=generator) + torch.arange(BLOCK + 1)) % VOCAB
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(out, steps: int, *, compile: bool = False, init_from: str = "scratch", dropout: float = 0.0):
    """train.py from model init to checkpoint, in its order and with its arguments. Returns the losses and the model."""
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, bias=False, vocab_size=None, dropout=dropout)
    checkpoint = None
    torch.manual_seed(1337)
    if init_from == "scratch":
        args["vocab_size"] = VOCAB
        model = GPT(GPTConfig(**args))
    elif init_from == "resume":
        checkpoint = torch.load(out / "ckpt.pt", map_location="cpu")
        args |= {k: checkpoint["model_args"][k] for k in CHECKPOINTED}
        model = GPT(GPTConfig(**args))
        state = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
        model.load_state_dict(state)
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
        args |= {k: getattr(model.config, k) for k in CHECKPOINTED}
    if BLOCK < model.config.block_size:
        model.crop_block_size(BLOCK)
        args["block_size"] = BLOCK
    model.to("cpu")

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    raw_model = model
    if compile:
        model = torch.compile(model, backend="eager")

    start = checkpoint["iter_num"] if checkpoint else 0
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            model.eval()
            logits, loss = model(*batch(generator))
            assert logits.shape == (BATCH, BLOCK, args["vocab_size"]) and math.isfinite(loss.item())
            model.train()
        for _ in range(2):
            _, loss = model(*batch(generator))
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert f"{raw_model.estimate_mfu(BATCH * 2, 0.5) * 100:.2f}%" == "nan%", "this CPU's peak is not known"
    # What is saved is the compiled model's, so that the prefix has to come off again.
    torch.save(
        dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=start + steps),
        out / "ckpt.pt",
    )
    return losses, raw_model


@pytest.mark.parametrize("compile", [False, True])
def test_training_learns_and_resumes_exactly(tmp_path, compile):
    whole, model = train(tmp_path, 16, compile=compile)
    assert whole[-1] < 0.8 * whole[0]
    assert model.get_num_params() == model.config.num_params(non_embedding=True)
    train(tmp_path, 10, compile=compile)
    names = torch.load(tmp_path / "ckpt.pt")["model"]
    assert all(name.startswith("_orig_mod.") == compile for name in names)
    rest, _ = train(tmp_path, 6, compile=compile, init_from="resume")
    assert rest == whole[10:]


def test_finetuning_starts_from_gpt2_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "gpt2", hf_gpt2(vocab_size=VOCAB, n_positions=BLOCK + 8))
    losses, model = train(tmp_path, 2, init_from="gpt2", dropout=0.1)
    assert model.config.dropout == 0.1 and model.config.block_size == BLOCK and model.config.bias
    again, _ = train(tmp_path, 1, init_from="resume")
    assert len(losses) == 2 and len(again) == 1


@pytest.mark.parametrize("compile", [False, True])
def test_sampling(tmp_path, monkeypatch, compile):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "gpt2", hf_gpt2(vocab_size=VOCAB))
    model = GPT.from_pretrained("gpt2", dict(dropout=0.0))
    model.eval()
    model.to("cpu")
    if compile:
        model = torch.compile(model, backend="eager")
    x = torch.tensor([5, 6, 7], dtype=torch.long)[None, ...]
    with torch.no_grad():
        y = model.generate(x, 40, temperature=0.8, top_k=200)
    assert y.shape == (1, 43) and torch.equal(y[:, :3], x) and len(y[0].tolist()) == 43
    assert not model.training


def test_benchmarking():
    model = GPT(GPTConfig(block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, dropout=0, bias=False))
    optimizer = model.configure_optimizers(weight_decay=1e-2, learning_rate=1e-4, betas=(0.9, 0.95), device_type="cpu")
    x, y = batch(torch.Generator().manual_seed(0))
    logits, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    assert math.isnan(model.estimate_mfu(fwdbwd_per_iter=BATCH, dt=0.1))


def test_mfu_is_nanogpt_s_formula_over_the_peak_of_this_gpu(monkeypatch):
    """(6 N + 12 L H Q T) T fwdbwd_per_iter / dt / peak, with nanoGPT's numbers for 124M on an A100."""
    from fastgpt2.gpt2 import hardware

    with torch.device("meta"):
        model = GPT(GPTConfig())
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 312e12)
    flops = (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024) * 1024 * 480
    assert model.estimate_mfu(480, 2.5) == pytest.approx(flops / 2.5 / 312e12)
