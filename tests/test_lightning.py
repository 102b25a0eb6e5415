"""Lightning's Trainer on our model: two steps are those of a loop, and its checkpoint comes back."""

import pytest
import torch
from hf_models import DEVICE
from tiny_models import tiny

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_two_steps_and_a_checkpoint(tmp_path):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.gpt = tiny(n_embd=32)
            self.gpt.kernels = "triton"

        def training_step(self, batch, index):
            return self.gpt(*batch)[1]

        def configure_optimizers(self):
            return torch.optim.SGD(self.gpt.parameters(), lr=0.1)

    batches = list(torch.randint(50, (2, 2, 2, 5)))
    ours, plain = Module(), Module().to(DEVICE)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator=DEVICE.type, devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(ours, torch.utils.data.DataLoader(batches, batch_size=None))
    optimizer = plain.configure_optimizers()
    for idx, targets in batches:
        optimizer.zero_grad()
        plain.gpt(idx.to(DEVICE), targets.to(DEVICE))[1].backward()
        optimizer.step()
    expected = {name: value.cpu() for name, value in plain.state_dict().items()}
    torch.testing.assert_close({name: value.cpu() for name, value in ours.state_dict().items()}, expected)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    torch.testing.assert_close(again.state_dict(), expected)
    assert again.gpt.lm_head.weight is again.gpt.transformer.wte.weight
