"""`fastgpt2 sample`: text from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.data.sources import SURROGATE
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import MAX_SEED
from fastgpt2.gpt2.generation.sample import load_checkpoint, prompt_tokens, stream_text, write_texts
from fastgpt2.gpt2.generation.sampling import Sampling
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.options import Checkpoint, CommandOptions, File, Name, Source, Text
from fastgpt2.gpt2.output import visible
from fastgpt2.gpt2.packed import quantize_int8
from fastgpt2.gpt2.training.progress import stages
from fastgpt2.gpt2.training.train_config import DTYPES, find_device

RULE = "-" * 80


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Writes text with a run of `fastgpt2 train`, a checkpoint folder, or a model of the hub. Without --prompt and
    --file the prompt is read from standard input or, at a terminal, asked for again and again.
    """

    checkpoint: Checkpoint  # the folder of a run, a checkpoint, or the name of a model on the hub, such as gpt2
    check: bool = True  # compare a run's checkpoint with what the run wrote
    tokenizer: Source | None = None  # gpt2, byte or a vocabulary's path, for a checkpoint without a tokenizer
    prompt: Text | None = None  # how the text begins
    file: File | None = None  # holds the prompt, in UTF-8; - is standard input
    interactive: bool = False  # ask for prompts until Ctrl-D
    stream: bool = False  # write each piece of the text as soon as it is there
    json: bool = False  # one line for each text, with prompt, completion, tokens, logprobs and how it ended
    num: int = 1  # how many texts to write
    max_new_tokens: int = 200  # tokens after the prompt
    stop: Text | None = None  # a text ends before these words, as it does before the tokenizer's end of text
    special_tokens: bool = False  # the name of a special token in the prompt, such as <|endoftext|>, means that token
    temperature: float = 0.8  # above 0; the smaller it is, the likelier the tokens
    top_k: int | None = None  # only the N likeliest tokens; None: all
    top_p: float | None = None  # only the likeliest tokens that hold X of the probability; None: all
    min_p: float | None = None  # only tokens with at least X times the likeliest one's probability; None: all
    repetition_penalty: float = 1.0  # above 1, tokens that the text already has become rarer
    seed: int = 1337  # of the draws
    greedy: bool = False  # always the likeliest token
    refuse_long: bool = False  # an error for a prompt longer than block_size; without it the prompt's end is used
    kernels: Name = "auto"  # auto, triton, torch, or a list such as attention=cudnn,mlp; auto: triton on CUDA
    device: Name = "auto"  # cpu, cuda, cuda:1, ...; auto: CUDA or ROCm where there is one
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights
    weights: Literal["int8"] | None = None  # round the linear layers' weights to 8 bits, for speed on a CPU
    compile: bool = False  # compute each token through torch.compile


def main(argv: Sequence[str]) -> int:
    """Writes text to standard output; returns 0."""
    args = parse(Options, argv, "fastgpt2 sample")
    _only_one(prompt=args.prompt, file=args.file, interactive=args.interactive)
    _only_one(stream=args.stream, json=args.json)
    interactive = args.interactive or (args.prompt is None and args.file is None and sys.stdin.isatty())
    if interactive and args.json:
        raise ValueError("--json is for a prompt that is given, not for --interactive")
    if args.greedy:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if getattr(args, name) != getattr(Options, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag} is {getattr(args, name)} and --greedy takes the likeliest token: leave one out"
                )
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
    if args.weights and (device.type != "cpu" or args.compile):
        other = "--compile is given" if args.compile else f"the device is {device}"
        raise ValueError(f"--weights is {args.weights}, which is for a CPU and without --compile, and {other}")
    with stages(Console(stderr=True), "loading the model"):
        model, tokenizer = load_checkpoint(args.checkpoint, args.kernels, args.tokenizer, check=args.check)
    model.to(device, DTYPES[args.dtype]).eval()
    if args.weights:
        model = quantize_int8(model)
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


def _only_one(**options: object) -> None:
    """Raises ValueError where more than one of these options was given."""
    given = [f"--{name}" for name, value in options.items() if value not in (None, False)]
    if len(given) > 1:
        allowed = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"{' and '.join(given)} are given together, allowed is one of {allowed}")


def _prompt(args: Options) -> str:
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
