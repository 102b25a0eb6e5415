"""trl's SFTTrainer on transformers' GPT-2, accelerated in place: a step is the step of the model as it was."""

import copy

import pytest
import torch
from hf_models import DEVICE, TINY, hf_gpt2

from fastgpt2 import hf

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(TINY["vocab_size"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w1", eos_token="w2", unk_token="w0")


def stepped(folder, model):
    """(loss, weights) after one step on two rows of different lengths, so that one is padded."""
    from datasets import Dataset

    settings = trl.SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, optim="sgd", report_to=[],
        max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, use_cpu=DEVICE.type == "cpu", bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": list(range(3, 3 + n))} for n in (9, 6)])
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer())
    loss = trainer.train().training_loss
    return loss, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_step_of_sft(tmp_path, kernels):
    eager = hf_gpt2(n_layer=1).to(DEVICE)
    before = {name: p.detach().clone() for name, p in eager.named_parameters()}
    ours = hf.accelerate(copy.deepcopy(eager), kernels)
    found, expected = stepped(tmp_path, ours), stepped(tmp_path, eager)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1])
    assert any(not torch.equal(p, before[name]) for name, p in found[1].items())
