"""`fastgpt2 eval`: validation loss, perplexity and HellaSwag of a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.data import shards, windows
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.evaluation.evaluate import Watch, mean_loss, text_loss, windows_at_once
from fastgpt2.gpt2.evaluation.hellaswag import DOWNLOAD, hellaswag, read_examples
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.options import Checkpoint, CommandOptions, Folder, Name, Source, Word
from fastgpt2.gpt2.output import plain_console
from fastgpt2.gpt2.training.progress import line, stages, watched
from fastgpt2.gpt2.training.settings import DtypeName
from fastgpt2.gpt2.training.train_config import DTYPES, find_device


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Evaluates a run of `fastgpt2 train`, a checkpoint folder, or a model of the hub. The last line is JSON."""

    checkpoint: Checkpoint  # the folder of a run, a checkpoint, or the name of a model on the hub, such as gpt2
    check: bool = True  # compare a run's checkpoint with the checksums that the run wrote
    tokenizer: Source | None = None  # gpt2, byte or a vocabulary's path, for a checkpoint without a tokenizer
    data: Folder | None = None  # measure the loss on the validation shards of this folder; see fastgpt2 prepare
    tokens: int = 2**20  # how many tokens of --data to use, always the same ones; at least one window of block_size
    # measure the perplexity of a file or folder of text, .jsonl or .parquet
    text: Annotated[str, Word("PATH")] | None = None
    # tokens of --text from one window to the next; fewer than block_size give each token more context, and take longer;
    # None: block_size
    stride: int | None = None
    # score HellaSwag in both ways, from a FILE (the official JSONL); without a FILE it comes from the network
    hellaswag: Annotated[str | None, Word("FILE", bare=DOWNLOAD)] = None
    limit: int | None = None  # only the first N examples of HellaSwag; None: all
    # windows, or examples of HellaSwag, that are computed at once; None: 8, and on a GPU up to 64, as memory allows
    batch_size: int | None = None
    dtype: DtypeName = "auto"  # of matrix products; auto: bfloat16 on CUDA, float32 elsewhere
    kernels: Name = "auto"  # auto, triton, torch, or a list such as attention=cudnn,mlp; auto: triton on CUDA
    device: Name = "auto"  # cpu, cuda, cuda:1, ...; auto: CUDA or ROCm where there is one


def main(argv: Sequence[str]) -> int:
    """Prints a line for each thing asked for, then all of it as one line of JSON; returns 0."""
    args = parse(Options, argv, "fastgpt2 eval")
    if args.data is None and args.text is None and args.hellaswag is None:
        raise ValueError("nothing to evaluate: give --data, --text or --hellaswag")
    for name in ("batch_size", "tokens", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, allowed are whole numbers of at least 1")
    # Everything that can be missing or damaged is looked at before anything is computed.
    examples = None if args.hellaswag is None else read_examples(args.hellaswag)[: args.limit]
    device, console = find_device(args.device), plain_console()
    with stages(console, "start") as say:
        text = None if args.text is None else windows.read_text(args.text, say)
        say("loading the model")
        model, tokenizer = load_checkpoint(args.checkpoint, args.kernels, args.tokenizer, check=args.check)
        tokens = None if args.data is None else _validation_tokens(args.data, tokenizer, say)
        text_tokens = None if text is None else windows.encode_text(text, tokenizer, say)
    model = model.to(device)
    batch_size = args.batch_size or windows_at_once(model, device)
    results: dict[str, Any] = {"checkpoint": args.checkpoint}
    with _autocast(args.dtype, device):
        if tokens is not None:
            watch = watched(console, "data")
            results["val"] = _validation_loss(model, tokens, args.tokens, batch_size, device, watch)
            line(console, "data       val loss {loss:.4f} nats a token, {tokens:,} tokens".format(**results["val"]))
        if text is not None:
            if unknown := "".join(dict.fromkeys("".join(map(tokenizer.unknown, text.documents)))):
                warnings.warn(
                    f"--text: the tokenizer has no token for {len(unknown)} of its characters, such as {unknown[0]!r}: "
                    "all of them are one character to it, and its loss is not that of the text",
                    stacklevel=1,
                )
            found = text_loss(
                model,
                tokenizer,
                text,
                stride=args.stride,
                batch_size=batch_size,
                device=device,
                watch=watched(console, "text"),
                tokens=text_tokens,
            )
            results["text"] = dataclasses.asdict(found)
            line(
                console,
                f"text       loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.2f}, "
                f"{found.bits_per_byte:.4f} bits a byte, {found.tokens:,} tokens",
            )
        if examples is not None:
            watch = watched(console, "hellaswag")
            score = hellaswag(model, tokenizer, examples, batch_size=4 * batch_size, device=device, watch=watch)
            results["hellaswag"] = dataclasses.asdict(score)
            line(
                console,
                f"hellaswag  EleutherAI's harness: acc {score.harness_acc:.4f}, acc_norm {score.harness_acc_norm:.4f}, "
                f"acc_bytes {score.harness_acc_bytes:.4f}; build-nanogpt: acc {score.nanogpt_acc:.4f}, "
                f"acc_norm {score.nanogpt_acc_norm:.4f}; {score.examples:,} examples",
            )
    line(console, json.dumps(results))
    return 0


def _validation_tokens(folder: str, tokenizer: Tokenizer, say: windows.Say) -> shards.Shards:
    """The held-out tokens of a folder, which must be the checkpoint's kind of tokens."""
    tokens = shards.open_tokens(folder, "val", say=say)
    with contextlib.suppress(FileNotFoundError):  # other projects' shards bring no tokenizer
        if tokenizers.load(folder) != tokenizer:
            raise ValueError(f"{folder} was encoded by another tokenizer than the checkpoint's: their losses differ")
    windows.check_tokens(tokens, tokenizer.vocab_size)
    return tokens


def _validation_loss(
    model: GPT, tokens: shards.Shards, most: int, batch_size: int, device: torch.device, watch: Watch
) -> dict[str, Any]:
    T = model.config.block_size
    batches = list(windows.eval_batches(tokens, T, batch_size, max(1, most // T)))
    return {
        "tokens": sum(targets.numel() for _, targets in batches),
        "loss": mean_loss(model, watch(batches), device),
    }


@contextlib.contextmanager
def _autocast(dtype: str, device: torch.device) -> Iterator[None]:
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        yield
