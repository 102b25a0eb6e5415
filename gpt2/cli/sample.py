"""`fastgpt2 sample`: text from a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastgpt2.gpt2.data.sources import SURROGATE
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import MAX_SEED
from fastgpt2.gpt2.generation.sample import load_checkpoint, prompt_tokens, stream_text, write_texts
from fastgpt2.gpt2.generation.sampling import Sampling
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.output import visible
from fastgpt2.gpt2.training.progress import stages
from fastgpt2.gpt2.training.train_config import DTYPES, find_device

RULE = "-" * 80


def main(argv: Sequence[str]) -> int:
    """Writes text to standard output; returns 0."""
    args = parser().parse_args(argv)
    interactive = args.interactive or (args.prompt is None and args.file is None and sys.stdin.isatty())
    if interactive and args.json:
        raise ValueError("--json is for a prompt that is given, not for --interactive")
    if args.num < 1:
        raise ValueError(f"num is {args.num}, allowed are 1 and above")
    if not 0 <= args.seed <= MAX_SEED:
        raise ValueError(f"seed is {args.seed}, allowed are 0..{MAX_SEED}")
    if (args.stream or interactive) and args.num > 1:
        raise ValueError(f"--num is {args.num}, --stream and --interactive write one text at a time")
    prompt = "" if interactive else _prompt(args)
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = {name: getattr(args, name) for name in names}
    Sampling(**sampling)  # wrong settings are told before the model is loaded
    device = find_device(args.device)
    with stages(Console(stderr=True), "loading the model"):
        model, tokenizer = load_checkpoint(args.checkpoint, args.kernels, args.tokenizer, check=not args.no_check)
    model.to(device, DTYPES[args.dtype]).eval()
    settings = dict(
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        special_tokens=args.special_tokens,
        crop=not args.refuse_long,
        compile=args.compile,
        **sampling,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="a prompt has")  # one that is typed twice is told about twice
        if interactive:
            return _converse(model, tokenizer, args.seed, settings)
        _check_length(model, tokenizer, prompt, settings)
        if args.stream:
            _stream(model, tokenizer, prompt, seed=args.seed, **settings)
            return 0
        texts = write_texts(model, tokenizer, prompt, num=args.num, seed=args.seed, with_logprobs=args.json, **settings)
    if args.json:
        for text in texts:
            print(json.dumps(dataclasses.asdict(text)))
    else:
        print(f"\n{RULE}\n".join(visible(text.prompt + text.completion) for text in texts))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """The prompt that was given, from an argument, a file or standard input."""
    if args.prompt is not None:
        source, prompt = "--prompt", args.prompt
    elif args.file not in (None, "-"):
        source, prompt = args.file, _decoded(args.file, Path(args.file).read_bytes()).removesuffix("\n")
    else:
        source, prompt = "standard input", sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise ValueError(f"{source} is empty: give at least one character to go on from")
    if SURROGATE.search(prompt):
        raise ValueError(f"{source} is not UTF-8 text: a prompt is")
    return prompt


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _check_length(model: GPT, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> None:
    """Raises ValueError, in the words of the command line, for a long prompt where --refuse-long was given."""
    length, most = len(prompt_tokens(tokenizer, prompt, settings["special_tokens"])), model.config.block_size
    if not settings["crop"] and length > most:
        raise ValueError(f"the prompt has {length} tokens, block_size is {most}, and --refuse-long is given")


def _stream(model: GPT, tokenizer: Tokenizer, prompt: str, **settings: Any) -> None:
    pieces = stream_text(model, tokenizer, prompt, **settings)
    print(visible(prompt), end="", flush=True)
    try:
        for piece in pieces:
            print(visible(piece), end="", flush=True)
    finally:  # also after Ctrl-C: what follows begins on a line of its own
        print(flush=True)


def _converse(model: GPT, tokenizer: Tokenizer, seed: int, settings: dict[str, Any]) -> int:
    """A text for every line that is typed. Ctrl-C ends a text, and where none is being written the command."""
    print("Type how a text begins. Ctrl-C ends a text, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not prompt:
            continue
        try:
            _check_length(model, tokenizer, prompt, settings)
            _stream(model, tokenizer, prompt, seed=seed, **settings)
        except KeyboardInterrupt:
            pass
        except ValueError as error:  # a character that the tokenizer does not have, say
            print(f"fastgpt2: error: {error}", file=sys.stderr)
        seed += 1  # the same beginning again goes on in another way


def parser() -> argparse.ArgumentParser:
    """What can be typed after `fastgpt2 sample`."""
    parser = argparse.ArgumentParser(
        prog="fastgpt2 sample",
        description="Writes text with a run of `fastgpt2 train`, a checkpoint folder, or a model of the hub. Without "
        "--prompt and --file the prompt is read from standard input or, at a terminal, asked for again and again.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN|FOLDER|NAME", help="a run's folder, a checkpoint, or gpt2, ...")
    add("--no-check", action="store_true", help="do not compare a run's checkpoint with what the run wrote")
    add("--tokenizer", metavar="NAME|PATH", help="gpt2, byte or a vocabulary, where the checkpoint brings none")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="how the text begins")
    prompt.add_argument("--file", metavar="FILE", help="holds the prompt, UTF-8; - is standard input")
    prompt.add_argument("--interactive", action="store_true", help="asks for prompts until Ctrl-D")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="write each piece of the text as soon as it is there")
    form.add_argument("--json", action="store_true", help="a line a text: prompt, completion, tokens, logprobs, ended")
    add("--num", type=int, default=1, metavar="N", help="texts (%(default)s)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens after the prompt (%(default)s)")
    add("--stop", metavar="TEXT", help="a text ends before this (also before the tokenizer's end of text)")
    add("--special-tokens", action="store_true", help="a special token's name in the prompt, such as <|endoftext|>, "
        "which may be all of it, is that token")  # fmt: skip
    add("--temperature", type=float, default=0.8, metavar="X", help="above 0; small: likely tokens (%(default)s)")
    add("--top-k", type=int, metavar="N", help="only the N likeliest tokens (all)")
    add("--top-p", type=float, metavar="X", help="only the likeliest tokens that hold X of the probability (all)")
    add("--min-p", type=float, metavar="X", help="only tokens with X times the likeliest's probability (all)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens of the text so far are rarer",
    )
    add("--seed", type=int, default=1337, metavar="N", help="of the draws (%(default)s)")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--refuse-long", action="store_true", help="an error for a prompt beyond block_size, whose end is used else")
    add("--kernels", default="auto", metavar="NAME", help="auto, triton, torch, or a list such as attention,mlp")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, ...; auto: CUDA or ROCm where there is one")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights (%(default)s)")
    add("--compile", action="store_true", help="the work of a token through torch.compile")
    return parser
