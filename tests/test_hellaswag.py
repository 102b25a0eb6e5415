"""HellaSwag: the official file's rows, both ways to ask, and batches against one ending at a time."""

import dataclasses
import io
import json
import types

import numpy as np
import pytest
import test_evaluate
from test_evaluate import BPE, CPU, nats
from tiny_run import TINY, run, settings_in

from fastgpt2.gpt2.evaluation import hellaswag as module
from fastgpt2.gpt2.evaluation.hellaswag import hellaswag, read_examples
from fastgpt2.gpt2.training.train_config import TrainConfig
from fastgpt2.gpt2.training.trainer import Trainer

ROWS = [
    {
        "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is on a roof.", "ctx_b": "he",
        "ctx": "A man is on a roof. he", "split": "val", "split_type": "indomain", "label": 3, "source_id": "a~1",
        "endings": ["naps.", "is ripping level tiles off.", "eats é and ü.", "starts pulling up roofing on a roof."],
    },
    {
        "activity_label": "Health", "ctx_a": "[header] How to sleep [title] Go to bed. [step] It helps.", "ctx_b": "",
        "ctx": "[header] How to sleep [title] Go to bed. [step] It helps.", "label": "0",
        "endings": ["Close  your eyes. [substeps] Count.", "Run.", "[step] Drink tea [title] and more tea.", "No."],
    },
    {
        "activity_label": "Run", "ctx_a": "x", "ctx_b": "the end [step]", "ctx": "x the end [step]", "label": 2,
        "endings": ["a", "bb bb bb bb bb bb bb", "ccc", "d d"],
    },
]  # fmt: skip
# What EleutherAI's harness makes of them, by hand.
ASKED = [
    ("Roof shingle removal: A man is on a roof. He", ROWS[0]["endings"]),
    (
        "Health: How to sleep. Go to bed. It helps.",
        ["Close your eyes. Count.", "Run.", " Drink tea. and more tea.", "No."],
    ),
    ("Run: x The end ", ["a", "bb bb bb bb bb bb bb", "ccc", "d d"]),
]
model = test_evaluate.model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_harness_asks_without_marks(file):
    for example, (context, endings) in zip(read_examples(file), ASKED, strict=True):
        assert module._harness_context(example) == context
        assert [module._harness_text(ending) for ending in example.endings] == list(endings)


def test_scores_are_those_of_one_ending_at_a_time(file, model):
    examples = read_examples(file)
    plain, marked = [], []
    for example, (asked, endings) in zip(examples, ASKED, strict=True):
        for ending in example.endings:
            before, after = (BPE.encode(s).tolist() for s in (example.context, " " + ending))
            losses = nats(model, (before + after)[-test_evaluate.T - 1 :])[-len(after) :]
            plain.append((sum(losses), 1, len(after)))
        for ending in endings:
            whole = BPE.encode(f"{asked} {ending}").tolist()
            losses = nats(model, whole[-test_evaluate.T - 1 :])[-(len(whole) - len(BPE.encode(asked.rstrip()))) :]
            marked.append((sum(losses), 1, len(ending), len(ending.encode())))

    def right(pairs, by):
        scores = np.array([pair[0] / pair[by] for pair in pairs]).reshape(-1, 4)
        return np.mean([row.argmin() == e.label for row, e in zip(scores, examples, strict=True)])

    for batch_size in (1, 5, 64):
        found = hellaswag(model, BPE, examples, batch_size=batch_size, device=CPU)
        assert found.examples == 3
        assert (found.nanogpt_acc, found.nanogpt_acc_norm) == (right(plain, 1), right(plain, 2))
        assert (found.harness_acc, found.harness_acc_norm) == (right(marked, 1), right(marked, 2))
        assert found.harness_acc_bytes == right(marked, 3)


@pytest.mark.parametrize(
    ("endings", "losses", "expected"),
    [
        # Labels that the scores choose, in their order. "th" is one token, and so is the space.
        (["abcdef", "thththth", "a", "b"], [5, 5, 4, 9], (2, 0, 2, 1, 1)),
        (["abcd", "ééé", "a", "b"], [5, 5, 9, 4], (3, 1, 3, 0, 1)),
    ],
)
def test_each_score_normalises_in_its_own_way(monkeypatch, endings, losses, expected):
    monkeypatch.setattr(module, "continuation_loss", lambda *args, **how: np.array(losses, float))
    for label in range(4):
        example = module.Example("x", "x", "x", "", tuple(endings), label)
        found = hellaswag(None, BPE, [example], device=CPU)
        scores = dataclasses.astuple(found)[1:]
        assert scores == tuple(float(choice == label) for choice in expected)


def test_the_space_before_an_ending_is_the_endings(file, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "continuation_loss", lambda _, rows, **how: asked.append(rows) or np.zeros(len(rows)))
    hellaswag(None, BPE, read_examples(file), device=CPU)
    plain, marked = ([(BPE.decode(tokens), BPE.decode(tokens[-n:])) for tokens, n in rows] for rows in asked)
    assert plain[0] == ("A man is on a roof. he naps.", " naps.")
    assert plain[-2] == ("x the end [step] ccc", " ccc")
    assert marked[-2] == ("Run: x The end  ccc", "  ccc")  # the context's own space too


# ------------------------------------------------------------------------------------------------------- reading


def test_rows_are_read_as_they_are(file):
    first, second, _ = read_examples(file)
    assert first.context == "A man is on a roof. he" and first.label == 3 and first.endings[0] == "naps."
    assert second.label == 0  # the hub's copy writes it as text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 4}, r"label is 4, allowed are 0\.\.3"),
        ({"label": ""}, "line 2 is not an example with a label"),
        ({"endings": ["a"]}, "expected 4 texts"),
        ({"endings": ["a", "b", "", "d"]}, "expected 4 texts"),
        ({"ctx": " "}, "ctx is empty"),
        ({"ctx_a": ...}, "line 2 is not an example with a label: 'ctx_a' is missing"),
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path, change, message):
    row = {k: v for k, v in {**ROWS[0], **change}.items() if v is not ...}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=message) as raised:
        read_examples(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no examples"), ("[1]", "line 1 is not an example"), ("{", "line 1 is not an example")],
)
def test_a_file_without_examples_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"a.jsonl.*{message}"):
        read_examples(tmp_path / "a.jsonl")


def test_the_official_file_is_downloaded_once(tmp_path, monkeypatch, file):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def answer(url, timeout):
        asked.append(url)
        if len(asked) == 1:
            raise OSError("no route to host")
        return io.BytesIO(file.read_bytes())

    monkeypatch.setattr(module.urllib.request, "urlopen", answer)
    with pytest.raises(OSError, match=r"hellaswag_val.jsonl could not be downloaded \(no route.*--hellaswag FILE"):
        read_examples()
    assert read_examples() == read_examples() == read_examples(file)
    assert asked == [module.URL] * 2


# ------------------------------------------------------------------------------------------------------ training


def test_a_run_scores_itself_at_each_validation(tmp_path, file):
    result, log, said = run(settings_in(tmp_path), steps=4, eval_interval=2, hellaswag=str(file))
    assert [r["step"] for r in log if "hellaswag" in r] == [2, 4]
    _, expected = module.nanogpt_scores(result.model, result.tokenizer, read_examples(file), device=CPU)
    assert log[-1]["hellaswag"] == pytest.approx(expected) and f"hellaswag {expected:.4f}" in said
    with pytest.raises(OSError, match="missing.jsonl"):
        run(settings_in(tmp_path), hellaswag=str(tmp_path / "missing.jsonl"))


def test_ranks_share_the_examples(file, model):
    examples = read_examples(file) * 7
    rng = np.random.default_rng(0)
    examples = [dataclasses.replace(e, label=int(rng.integers(4))) for e in examples]
    config = TrainConfig(**TINY).on_this_machine()
    tokens = np.zeros(100, np.uint16)
    trainer = Trainer(config, BPE, tokens, tokens)
    trainer.model = model
    alone = trainer.hellaswag(examples)
    assert alone == pytest.approx(module.nanogpt_scores(model, BPE, examples, device=CPU)[1]) and 0 < alone < 1
    parts = []
    for rank in range(3):
        trainer.ranks = types.SimpleNamespace(
            rank=rank, size=3, first=rank == 0, all_reduce=lambda values: values.tolist()
        )
        parts.append(trainer.hellaswag(examples))
    assert sum(parts) == pytest.approx(alone) and max(parts) < alone
