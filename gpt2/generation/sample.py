"""Generating text: a prompt is encoded, the model continues its tokens, and the new tokens are decoded.

    texts = generate_text(model, tokenizer, "Once", num=3, top_k=50)
    for piece in stream_text(model, tokenizer, "Once", stop="\n\n"): print(piece, end="", flush=True)

A text ends with the tokenizer's end of text, before the stop string, or after max_new_tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.pieces import Pieces
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.generation.generate import Generation
from fastgpt2.gpt2.generation.sampling import Sampling
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.weights.checkpoints import FILES, folder_to_read
from fastgpt2.gpt2.weights.pretrained import CONFIG, HUB_NAMES, from_pretrained

PADDED_TO = (64, 128, 256, 512)  # multiples that people round the rows of a token table up to


@dataclass(frozen=True)
class Text:
    """A text that was generated after a prompt.

    tokens: the number of sampled tokens, including the one that ended the text. logprobs: their log-probabilities under
    the model (see `Generation`), or None without with_logprobs. ended: "end_of_text", "stop" or "length".
    """

    prompt: str
    completion: str
    tokens: int
    logprobs: list[float] | None
    ended: str


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, **settings: Any) -> list[str]:
    """Texts that begin with `prompt`; settings as for `write_texts`."""
    return [text.prompt + text.completion for text in write_texts(model, tokenizer, prompt, **settings)]


def write_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num: int = 1,
    stop: str | None = None,
    special_tokens: bool = False,
    **settings: Any,
) -> list[Text]:
    """Generates `num` texts after `prompt` in one batch. The same seed gives the same texts.

    stop: a text ends before this string.
    special_tokens: where `prompt` has the name of a special token, such as <|endoftext|>, that token is meant; a prompt
        may be nothing else. False: the name is read as ordinary characters.
    settings: max_new_tokens (default 200), seed (0), with_logprobs (False), crop (as for `Generation`), compile (as for
        `Decoder`), and the fields of `Sampling`.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    if num < 1:
        raise ValueError(f"num is {num}, allowed are 1 and above")
    tokens = prompt_tokens(tokenizer, prompt, special_tokens)
    rows = [Pieces(tokenizer, stop, tokens.tolist()) for _ in range(num)]
    generation = _begin(model, tokenizer, tokens, num, **settings)
    with contextlib.closing(generation):
        if stop is None:  # no token has to be decoded before the end
            for _ in generation:
                pass
            drawn = generation.ids[:, generation.T :].tolist()
            for row, ids in zip(rows, drawn, strict=True):
                for token in ids:
                    row.add(token)
        else:
            for column in generation:
                for row, token in zip(rows, column.tolist(), strict=True):
                    row.add(token)
                if all(row.ended for row in rows):
                    break
    for row in rows:
        row.finish()
    logprobs = generation.logprobs.tolist() if settings.get("with_logprobs") else [None] * num
    return [
        Text(prompt, row.text, row.tokens, values and values[: row.tokens], row.ended or "length")
        for row, values in zip(rows, logprobs, strict=True)
    ]


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: str | None = None,
    special_tokens: bool = False,
    **settings: Any,
) -> Iterator[str]:
    """Yields the text after `prompt` in pieces as it is generated: whole characters, without the stop string.

    Arguments as for `write_texts`. They are checked before the first piece is requested.
    """
    tokens = prompt_tokens(tokenizer, prompt, special_tokens)
    text = Pieces(tokenizer, stop, tokens.tolist())
    return _pieces(_begin(model, tokenizer, tokens, 1, **settings), text)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, special_tokens: bool = False) -> np.ndarray:
    """The tokens of a prompt, (T,). special_tokens: as for `write_texts`.

    Raises ValueError for an empty prompt, for characters that the tokenizer has no token for, and for special_tokens
    where it has no special tokens.
    """
    if not prompt:
        raise ValueError("prompt is empty: give at least one character to go on from")
    tokens = tokenizer.encode_with_special(prompt) if special_tokens else tokenizer.encode(prompt)
    plain = prompt
    for name in tokenizer.special_tokens if special_tokens else ():
        plain = plain.replace(name, "")
    if unknown := tokenizer.unknown(plain):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"prompt holds {', '.join(map(repr, unknown[:5]))}{more}, which the tokenizer has no token for: "
            f"its vocabulary has {tokenizer.vocab_size} tokens"
        )
    return tokens


def _pieces(generation: Generation, text: Pieces) -> Iterator[str]:
    with contextlib.closing(generation):
        for token in generation:
            if piece := text.add(int(token)):
                yield piece
            if text.ended:
                return
        if piece := text.finish():
            yield piece


def _begin(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    num: int,
    *,
    max_new_tokens: int = 200,
    seed: int = 0,
    crop: bool = True,
    compile: bool = False,
    with_logprobs: bool = False,
    **sampling: Any,
) -> Generation:
    device = model.device
    row = torch.from_numpy(tokens.astype("int64")).to(device)
    return Generation(
        model,
        row.repeat(num, 1),
        max_new_tokens,
        Sampling(**sampling),
        torch.Generator(device).manual_seed(seed),
        stop_tokens=() if tokenizer.end_of_text is None else (tokenizer.end_of_text,),
        with_logprobs=with_logprobs,
        crop=crop,
        compile=compile,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),  # a table may have more rows
    )


# ------------------------------------------------------------------------------------------------------ checkpoints


def load_checkpoint(
    checkpoint: str | Path, kernels: str = "auto", tokenizer_spec: str | None = None, *, check: bool = True
) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a run's folder, of a folder that `from_pretrained` reads, or of a hub name.

    tokenizer_spec: a specification for `tokenizer.from_spec`, for a checkpoint without a tokenizer.
    check: as for `from_pretrained`.
    The token table may have more rows than the tokenizer has tokens: padding, or tokens that were never used.
    Raises ValueError if model and tokenizer do not fit together.
    """
    if str(checkpoint) and Path(checkpoint).is_dir():
        checkpoint = str(folder_to_read(Path(checkpoint), check))
    model = from_pretrained(checkpoint, kernels=kernels, check=False)
    V = model.config.vocab_size
    if tokenizer_spec is None:
        tokenizer = checkpoint_tokenizer(checkpoint, V)
    else:
        tokenizer = _named_tokenizer(checkpoint, tokenizer_spec)
    # A folder's own tokenizer of words may be smaller by any number: a [PAD] was added to the table alone, say. A run's
    # too, where it began with weights of another vocabulary.
    of_run = (Path(checkpoint) / FILES).is_file()
    own = (of_run or bool(tokenizer.files and tokenizer.special_tokens)) and tokenizer.vocab_size <= V
    if not own and not _is_padded(tokenizer.vocab_size, V):
        raise ValueError(f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} tokens, the model {V}")
    return model, tokenizer


def _is_padded(vocab_size: int, rows: int) -> bool:
    """Whether a table of `rows` can be one of vocab_size tokens: GPT-2's 50257 are often rounded up to 50304."""
    return any(rows == -(-vocab_size // multiple) * multiple for multiple in (1, *PADDED_TO))


def _brought_tokenizer(checkpoint: str | Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder, or in that of a checkpoint that is a file. FileNotFoundError for none."""
    path = Path(checkpoint)
    return tokenizers.load(path.parent if path.is_file() else path)


def _named_tokenizer(checkpoint: str | Path, spec: str) -> Tokenizer:
    """The tokenizer that `spec` names. Raises ValueError if the folder has a different one, or none for "char"."""
    try:
        own = _brought_tokenizer(checkpoint)
    except FileNotFoundError:
        if spec == "char":
            raise ValueError(
                f"tokenizer is 'char', whose characters are not known, because {checkpoint} has no tokenizer: "
                "give the path of its vocabulary, such as nanoGPT's meta.pkl"
            ) from None
        return tokenizers.from_spec(spec, [])
    if not tokenizers.is_named(spec, own):
        raise ValueError(f"tokenizer is {spec!r}, but {checkpoint} has another one: leave tokenizer out")
    return own


def checkpoint_tokenizer(checkpoint: str | Path, vocab_size: int) -> Tokenizer:
    """The checkpoint's tokenizer, or GPT-2's if it has none and vocab_size is that of GPT-2, or that rounded up.

    Raises FileNotFoundError if it has none and vocab_size differs from GPT-2's.
    """
    if str(checkpoint) not in HUB_NAMES or (Path(checkpoint) / CONFIG).is_file():
        try:
            here = Path(checkpoint).exists()
            return _brought_tokenizer(checkpoint) if here else tokenizers.download(str(checkpoint))
        except FileNotFoundError as error:
            if not _is_padded(tokenizers.GPT2_VOCAB_SIZE, vocab_size):
                raise FileNotFoundError(
                    f"{error}, and its {vocab_size} tokens are not GPT-2's vocabulary: give its own, --tokenizer PATH"
                ) from None
    return tokenizers.gpt2()
