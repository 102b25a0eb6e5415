"""The weights that a run begins with if `init_from` is given."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.generation.sample import checkpoint_tokenizer
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.train_config import ARCHITECTURE, TrainConfig
from fastgpt2.gpt2.weights.checkpoints import folder_to_read
from fastgpt2.gpt2.weights.pretrained import from_pretrained


class Beginning(NamedTuple):
    """model: with its weights. source: the file, folder or hub name of the weights and their tokenizer."""

    model: GPT
    source: str

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer. Raises OSError if it has none and none can be guessed."""
        return _tokenizer(self.source, self.model.config.vocab_size)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the tokenizer has more tokens than the model."""
        if tokenizer.vocab_size > (rows := self.model.config.vocab_size):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the token table of {self.source} {rows}: "
                "choose a tokenizer that fits, such as its own"
            )

    def note(self, tokenizer: Tokenizer) -> str | None:
        """What to tell the user if a run's tokenizer is not the checkpoint's, else None."""
        try:
            same = self.tokenizer() == tokenizer
        except (OSError, ValueError):
            return None
        return None if same else f"the text's tokenizer is not {self.source}'s: what a token stands for is learned anew"


@functools.lru_cache(maxsize=1)
def _tokenizer(source: str, vocab_size: int) -> Tokenizer:
    return checkpoint_tokenizer(source, vocab_size)


def beginning(config: TrainConfig, saved: Path | None) -> Beginning | None:
    """Loads the weights that a run begins with; None if it begins with new weights.

    saved: the checkpoint from which the run is resumed. If there is one, it is read instead of `init_from`.
    Raises ValueError if the config's sizes are not the checkpoint's, and what `from_pretrained` raises.
    """
    if config.init_from is None:
        return None
    found = Path(config.init_from)
    # Of a run of ours the newest whole checkpoint, and its tokenizer.
    source = str(saved or (folder_to_read(found) if found.is_dir() else found))
    settings = {"dropout": config.dropout, "vocab_multiple": config.vocab_multiple}
    model = from_pretrained(source, settings, kernels=config.kernels, check=False)
    for name in ARCHITECTURE:
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours}, and the model of init_from, {config.init_from}, has {theirs}")
    if config.block_size > (most := model.config.block_size):
        raise ValueError(
            f"block_size is {config.block_size}, and the model of init_from, {config.init_from}, has {most} positions"
        )
    if config.block_size < most:
        model.crop_block_size(config.block_size)
    return Beginning(model, source)
