"""Attention inside documents: where they begin, and that nothing crosses, by PyTorch and by Triton."""

import pytest
import torch
from tiny_run import TINY, run, settings_in

from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data import windows
from fastgpt2.gpt2.data.tokenizer import BPETokenizer
from fastgpt2.gpt2.evaluation.evaluate import evaluating
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.train import TrainConfig
from fastgpt2.gpt2.training.trainer import Trainer

END = 9
IDX = torch.tensor([[1, 2, END, 3, 4, 5, 6, END], [END, 1, 1, END, END, 2, 3, 4]])
STARTS = [0, 2, 7, 8, 11, 12, 16]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() >= 2 else 1)
    return model


def test_a_document_begins_at_each_end_of_text_and_each_row():
    document_starts = windows.document_starts(IDX, END)
    assert document_starts.tolist() == STARTS and document_starts.dtype == torch.int32
    assert windows.document_starts(IDX[:, :2], 99).tolist() == [0, 2, 4]


def test_one_document_a_row_is_plain_attention(model):
    document_starts = torch.tensor([0, 8, 16], dtype=torch.int32)
    expected, loss = model(IDX, IDX)
    found, found_loss = model(IDX, IDX, document_starts=document_starts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_loss, loss)


@pytest.mark.parametrize("kernels", ["torch", "attention"])
def test_nothing_crosses_from_one_document_to_another(model, kernels):
    model.kernels = kernels
    document_starts = windows.document_starts(IDX, END)
    expected = model(IDX, IDX, document_starts=document_starts)[0].flatten(0, 1)
    for begin, end in zip(STARTS, STARTS[1:], strict=False):
        changed = IDX.flatten().clone()
        changed[begin] = (changed[begin] + 1) % 9
        found = model(changed.view_as(IDX), IDX, document_starts=document_starts)[0].flatten(0, 1)
        moved = (found - expected).abs().amax(-1) > 1e-4
        assert moved.nonzero().flatten().tolist() == list(range(begin, end))


def test_both_ways_agree_in_loss_and_gradients(model):
    document_starts = windows.document_starts(IDX, END)
    results = []
    for kernels in ("torch", "triton"):
        model.zero_grad()
        model.kernels = kernels
        _, loss = model(IDX, IDX.roll(-1, 1), document_starts=document_starts)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for torch_way, triton_way in zip(*results, strict=True):
        torch.testing.assert_close(triton_way, torch_way, rtol=1e-4, atol=1e-5)


def test_any_number_of_documents_compiles_once_or_twice(model):
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for ends in (99, END, 1, 2, 3):
        document_starts = windows.document_starts(IDX, ends)
        torch.testing.assert_close(
            compiled(IDX, IDX, document_starts=document_starts), model(IDX, IDX, document_starts=document_starts)
        )
    assert len(frames) <= 2


@pytest.mark.parametrize(
    ("document_starts", "dtype", "message"),
    [
        ([0, 5], torch.int32, r"document_starts is \[0, 5\], expected to rise from 0 to 16"),
        ([1, 16], torch.int32, "rise from 0 to 16"),
        ([0, 8, 8, 16], torch.int32, "rise from 0 to 16"),
        ([0], torch.int32, r"document_starts is torch.int32 \(1,\), expected int32"),
        ([0, 16], torch.int64, "document_starts is torch.int64"),
    ],
)
def test_documents_that_are_none_are_refused(model, document_starts, dtype, message):
    with pytest.raises(ValueError, match=message):
        model(IDX, document_starts=torch.tensor(document_starts, dtype=dtype))


def test_the_former_name_documents_is_accepted(model):
    starts = windows.document_starts(IDX, END)
    expected = model(IDX, IDX, document_starts=starts)[1]
    with pytest.warns(DeprecationWarning, match="documents is now document_starts"):
        found = model(IDX, IDX, documents=starts)[1]
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="both are given"):
        model(IDX, IDX, documents=starts, document_starts=starts)


def test_a_cache_knows_no_documents(model):
    with pytest.raises(ValueError, match="document_starts cannot be used together with a cache"):
        model(IDX, cache=KVCache(model, 2, 8), document_starts=windows.document_starts(IDX, END))


# ------------------------------------------------------------------------------------------------------ training


def test_training_and_validation_stay_inside_documents():
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)} | {b"th": 256})
    tokens = windows.encode([(f"the {i}", True) for i in range(300)], tokenizer)
    train, val_tokens = windows.split(tokens, 0.1, block_size=16)
    losses = {}
    for mask in (False, True):
        torch.manual_seed(0)
        config = TrainConfig(**TINY, document_mask=mask).on_this_machine()
        trainer = Trainer(config, tokenizer, train, val_tokens)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(10 if parameter.dim() >= 2 else 1)
        idx, targets = windows.Windows(train, 16, config.seed).next_batch(4)
        document_starts = windows.document_starts(idx, tokenizer.end_of_text)
        assert len(document_starts) > 8
        expected = trainer.model(idx, targets, document_starts=document_starts if mask else None)[1].item()
        batches = list(windows.eval_batches(val_tokens, 16, 4, 8))
        given = [windows.document_starts(i, tokenizer.end_of_text) if mask else None for i, _ in batches]
        with evaluating(trainer.model):
            val = [trainer.model(*batch, document_starts=d)[1].item() for batch, d in zip(batches, given, strict=True)]
        assert trainer.validation_loss() == pytest.approx(sum(val) / len(val))
        losses[mask] = trainer.step(1).loss
        assert losses[mask] == pytest.approx(expected)
    assert abs(losses[True] - losses[False]) > 1e-3


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="document_mask is set, but the tokenizer has no end of text"):
        run(settings_in(tmp_path), document_mask=True)
