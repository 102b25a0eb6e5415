"""Writing text: from a prompt and a checkpoint, all at once or piece by piece."""

import pytest
import torch
from tiny_models import tiny

from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt2.gpt2.generation import sample
from fastgpt2.gpt2.generation.generate import generate
from fastgpt2.gpt2.generation.sample import generate_text, load_checkpoint, stream_text, write_texts
from fastgpt2.gpt2.weights.checkpoints import save_checkpoint


@pytest.fixture
def model():
    return tiny(vocab_size=256)


def test_texts_begin_with_the_prompt(model):
    texts = generate_text(model, ByteTokenizer(), "hé", num=3, max_new_tokens=5, seed=1)
    assert len(set(texts)) == 3 and all(t.startswith("hé") for t in texts)
    assert texts == generate_text(model, ByteTokenizer(), "hé", num=3, max_new_tokens=5, seed=1)
    assert texts != generate_text(model, ByteTokenizer(), "hé", num=3, max_new_tokens=5, seed=2)


@pytest.mark.parametrize(("wrong", "message"), [(dict(prompt=""), "prompt is empty"), (dict(num=0), "num is 0")])
def test_text_needs_a_prompt_and_a_number(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, ByteTokenizer(), **{"prompt": "a", **wrong})


def test_texts_tell_how_they_ended(model):
    settings = dict(max_new_tokens=9, greedy=True, with_logprobs=True)
    (text,) = write_texts(model, ByteTokenizer(), "hé", **settings)
    assert text.prompt == "hé" and text.ended == "length" and text.tokens == len(text.logprobs) == 9
    tokens = text.completion.encode()
    assert max(text.logprobs) < 0
    stop = text.completion[3:5]
    (cut,) = write_texts(model, ByteTokenizer(), "hé", **settings, stop=stop)
    assert cut.completion == text.completion[: text.completion.index(stop)] and cut.ended == "stop"
    assert cut.logprobs == pytest.approx(text.logprobs[: cut.tokens], abs=1e-4) and len(tokens) >= cut.tokens


def test_the_end_of_text_ends_a_text(model, monkeypatch):
    (text,) = write_texts(model, ByteTokenizer(), "ab", max_new_tokens=9, greedy=True)
    assert text.ended == "length" and text.logprobs is None
    drawn = generate(model, torch.tensor([[97, 98]]), 9, greedy=True)[0, 2:].tolist()
    monkeypatch.setattr(ByteTokenizer, "end_of_text", drawn[4])
    at = drawn.index(drawn[4])
    (ended,) = write_texts(model, ByteTokenizer(), "ab", max_new_tokens=9, greedy=True)
    assert ended.ended == "end_of_text" and ended.tokens == at + 1
    assert ended.completion == ByteTokenizer().decode(drawn[:at])
    assert "".join(stream_text(model, ByteTokenizer(), "ab", max_new_tokens=9, greedy=True)) == ended.completion


@pytest.mark.parametrize("stop", [None, "a", "qq", "\ufffd"])
def test_a_stream_is_the_text_in_pieces(model, stop):
    settings = dict(max_new_tokens=60, seed=3, temperature=2.0, stop=stop)
    (text,) = write_texts(model, ByteTokenizer(), "x", **settings)
    pieces = list(stream_text(model, ByteTokenizer(), "x", **settings))
    assert "".join(pieces) == text.completion and all(pieces)


def test_a_stream_checks_before_it_writes(model):
    for wrong, message in ((dict(temperature=0.0), "temperature is 0.0"), (dict(stop=""), "stop is empty")):
        with pytest.raises(ValueError, match=message):
            stream_text(model, ByteTokenizer(), "x", **wrong)
    with pytest.raises(TypeError, match="top_q"):
        stream_text(model, ByteTokenizer(), "x", top_q=1)


def test_a_stream_leaves_gradients_and_modes_alone(model):
    model.train()
    for _ in stream_text(model, ByteTokenizer(), "x", max_new_tokens=3):
        assert model.training and torch.is_grad_enabled()


def test_a_long_prompt_warns_or_is_refused(model):
    with pytest.warns(UserWarning, match="prompt has 12 tokens, block_size is 8: the model sees the last 8"):
        generate_text(model, ByteTokenizer(), "x" * 12, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt has 12 tokens, block_size is 8"):
        generate_text(model, ByteTokenizer(), "x" * 12, max_new_tokens=1, crop=False)


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_a_run_or_a_folder(model, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000009").mkdir(parents=True)
    folder = save_checkpoint(tmp_path / "run", 10, model, ByteTokenizer(), {}, keep=2)
    for path in (tmp_path / "run", str(folder)):
        loaded, tokenizer = load_checkpoint(path, kernels="torch")
        assert isinstance(tokenizer, ByteTokenizer) and loaded.config == model.config
        assert generate_text(loaded, tokenizer, "x", greedy=True) == generate_text(model, tokenizer, "x", greedy=True)


def test_a_checkpoint_without_its_tokenizer_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json.*256 tokens are not GPT-2's") as error:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_gpt2s_size_means_gpt2s_tokenizer(tmp_path, monkeypatch):
    tiny(vocab_size=50257).save_pretrained(tmp_path)
    stand_in = ByteTokenizer()
    stand_in.vocab_size = 50257
    monkeypatch.setattr(sample.tokenizers, "gpt2", lambda: stand_in)
    assert load_checkpoint(tmp_path)[1] is stand_in


def test_a_hub_name_brings_its_tokenizer(model, tmp_path, monkeypatch):
    ByteTokenizer().save(tmp_path)
    monkeypatch.setattr(sample, "from_pretrained", lambda name, kernels, check: model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert isinstance(load_checkpoint("someone/their-gpt")[1], ByteTokenizer)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    tiny(vocab_size=300).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model 300"):
        load_checkpoint(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint") as error:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_local_folder_called_gpt2_keeps_its_tokenizer(tmp_path, monkeypatch):
    tiny(vocab_size=256).save_pretrained(tmp_path / "gpt2")
    ByteTokenizer().save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_checkpoint("gpt2")[1], ByteTokenizer)


def test_a_tokenizer_can_be_named(tmp_path):
    tiny(vocab_size=256).save_pretrained(tmp_path)
    assert isinstance(load_checkpoint(tmp_path, tokenizer_spec="byte")[1], ByteTokenizer)


# --------------------------------------------------------------------- special tokens, and larger token tables

WORDS = BPETokenizer({bytes([b]): b for b in range(256)} | {b"ab": 256})  # 258 tokens with <|endoftext|>, the last


def test_a_special_token_in_the_prompt_is_one_when_asked_for():
    model = tiny(vocab_size=258, block_size=32)
    settings = dict(max_new_tokens=9, greedy=True)
    for prompt, ids in (("<|endoftext|>", [257]), ("a<|endoftext|>b", [97, 257, 98])):
        expected = WORDS.decode(generate(model, torch.tensor([ids]), 9, greedy=True, stop_tokens=[257])[0, len(ids) :])
        (text,) = write_texts(model, WORDS, prompt, special_tokens=True, **settings)
        assert text.completion == expected.removesuffix("<|endoftext|>") and text.prompt == prompt
        assert "".join(stream_text(model, WORDS, prompt, special_tokens=True, **settings)) == text.completion
        assert write_texts(model, WORDS, prompt, **settings)[0].completion != text.completion
    with pytest.raises(ValueError, match="special_tokens is set, and the tokenizer has no special tokens"):
        write_texts(tiny(vocab_size=256), ByteTokenizer(), "a", special_tokens=True)


@pytest.mark.parametrize("rows", [259, 320])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_tokens_that_the_tokenizer_lacks_are_never_drawn(tmp_path, rows, penalty):
    """As in tables of 50304 rows, or with a row for a [PAD] that the tokenizer does not have."""
    model = tiny(vocab_size=rows)
    model.transformer.ln_f.bias.data.copy_(20 * model.transformer.wte.weight[258].detach())  # likeliest by far
    model.save_pretrained(tmp_path)
    WORDS.save(tmp_path)
    again, tokenizer = load_checkpoint(str(tmp_path))
    assert again.config.vocab_size == rows and tokenizer == WORDS
    assert generate(again, torch.tensor([[97]]), 5, greedy=True)[0, 1:].tolist() == [258] * 5
    settings = dict(max_new_tokens=5, greedy=True, repetition_penalty=penalty, with_logprobs=True)
    (text,) = write_texts(again, tokenizer, "a", **settings)
    assert text.completion and max(text.logprobs) < -5  # of the model's whole distribution


def test_a_smaller_table_than_the_tokenizer_is_refused(tmp_path):
    tiny(vocab_size=257).save_pretrained(tmp_path)
    WORDS.save(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, the model 257"):
        load_checkpoint(str(tmp_path))


def test_a_named_tokenizer_fits_a_rounded_table_only(tmp_path):
    tiny(vocab_size=320).save_pretrained(tmp_path)
    WORDS.save(tmp_path / "words")
    assert load_checkpoint(tmp_path, tokenizer_spec=str(tmp_path / "words"))[1] == WORDS
    tiny(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model 300"):
        load_checkpoint(tmp_path, tokenizer_spec="byte")


@pytest.mark.parametrize("wrong", [0, 51])
def test_how_many_tokens_are_drawn_from_is_checked(wrong):
    with pytest.raises(ValueError, match=f"vocab_size is {wrong}, the model's is 50: allowed are 1..50"):
        generate(tiny(), torch.tensor([[1]]), 2, vocab_size=wrong)
