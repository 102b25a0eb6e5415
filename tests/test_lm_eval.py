"""EleutherAI's harness on an exported folder: the same questions, and the same log-likelihood of every ending."""

import numpy as np
import pytest
import test_evaluate
from test_hellaswag import ROWS, file  # noqa: F401  (a fixture)

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.evaluation import hellaswag as module

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_the_harness_gives_the_same_log_likelihoods(tmp_path, file):  # noqa: F811
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    from transformers import PreTrainedTokenizerFast

    examples = module.read_examples(file)
    columns = ("activity_label", "ctx_a", "ctx_b", "endings")
    docs = process_docs(
        Dataset.from_list([{**{c: row[c] for c in columns}, "label": str(row["label"])} for row in ROWS])
    )
    pairs = [(doc["query"], choice) for doc in docs for choice in doc["choices"]]
    assert pairs == [
        (module._harness_context(e), module._harness_text(ending)) for e in examples for ending in e.endings
    ]
    model = GPT(GPTConfig(block_size=64, vocab_size=test_evaluate.V, n_layer=2, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path)  # some questions are longer than block_size
    test_evaluate.BPE.save(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    harness = HFLM(str(tmp_path), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4)
    asked = [Instance("loglikelihood", {}, (query, f" {choice}"), i) for i, (query, choice) in enumerate(pairs)]
    found = np.array([value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)])
    rows = [module._joint_row(test_evaluate.BPE, *pair) for pair in pairs]
    losses = module.continuation_loss(model, rows, batch_size=4, device=test_evaluate.CPU)
    np.testing.assert_allclose(found, -losses, atol=1e-4)
