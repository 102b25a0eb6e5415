"""transformers' Trainer and peft on their own GPT-2, accelerated in place."""

import copy

import pytest
import torch
from hf_models import DEVICE, hf_gpt2
from hf_parity import IDS, labels_of, written
from transformers import Trainer, TrainingArguments

from fastgpt2 import hf

KERNELS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def lora(model):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj", "c_fc"]
    torch.manual_seed(4)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True)
    )


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("kernels", KERNELS)
def test_lora_before_and_after(kernels, accelerated_first):
    eager = hf_gpt2().to(DEVICE)
    ours = copy.deepcopy(eager)
    if accelerated_first:
        ours = lora(hf.accelerate(ours, kernels))
    else:
        ours = hf.accelerate(lora(ours), kernels)
    theirs = lora(eager)
    found, expected = (model(IDS, labels=labels_of({})) for model in (ours, theirs))
    found.loss.backward(), expected.loss.backward()
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    adapters = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 2 * 4
    torch.testing.assert_close({name: p.grad for name, p in ours.named_parameters() if p.requires_grad}, adapters)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    text = str(hf.report(ours))
    assert "h.0.attn.c_attn" in text and "transformers' forward" not in text
    merged = hf.restore(ours.merge_and_unload())
    assert type(merged) is type(theirs.merge_and_unload()) and torch.equal(written(merged), written(theirs))


def trained(folder, model, **settings):
    """(loss, weights after one step of Trainer, logits of evaluation)."""
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=0.0,
        use_cpu=DEVICE.type == "cpu", logging_steps=1, **settings,
    )  # fmt: skip
    data = [dict(input_ids=row.cpu(), labels=row.cpu()) for row in IDS]
    data[1]["labels"] = data[1]["labels"].masked_fill(torch.arange(9) < 5, -100)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    loss = trainer.train().training_loss
    return loss, {name: p.detach().clone() for name, p in model.named_parameters()}, trainer.predict(data).predictions


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("settings", [{}, dict(label_smoothing_factor=0.1)], ids=["plain", "label-smoothing"])
def test_a_step_of_trainer(tmp_path, kernels, settings):
    """num_items_in_batch counts over both passes: rows with 8 and 4 targets."""
    eager = hf_gpt2(n_layer=1).to(DEVICE)
    ours = hf.accelerate(copy.deepcopy(eager), kernels, training_logits=False)
    found, expected = trained(tmp_path, ours, **settings), trained(tmp_path, eager, **settings)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(expected[2]))
