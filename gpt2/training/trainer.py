"""The model, optimizer and data of a run: steps, validation, and a state from which it resumes bit for bit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.data.shards import Tokens
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import Windows, check_tokens, document_starts, eval_batches
from fastgpt2.gpt2.evaluation.evaluate import total_loss
from fastgpt2.gpt2.evaluation.hellaswag import Example, nanogpt_scores
from fastgpt2.gpt2.generation.sample import generate_text
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.graphed import graphed
from fastgpt2.gpt2.training.loss_watch import LossWatch
from fastgpt2.gpt2.training.optim import cosine_schedule, wsd_schedule
from fastgpt2.gpt2.training.ranks import Ranks, parallelize, set_gradient_sync
from fastgpt2.gpt2.training.run_folder import Record
from fastgpt2.gpt2.training.train_config import DTYPES, TrainConfig
from fastgpt2.gpt2.training.triton_adamw import TritonAdamW

SAMPLE_TOKENS = 300


class Trainer:
    """Everything that a step computes with. It writes no files.

    ranks: the processes that share the steps, by default only this one. Every method must be called on all of them.
    model: the model to train, of the sizes of `config`; by default a new one.
    Raises ValueError if config.document_mask is set and the tokenizer has no end of text.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        train_tokens: Tokens,
        val_tokens: Tokens,
        ranks: Ranks | None = None,
        model: GPT | None = None,
    ):
        self.config, self.tokenizer, self.val_tokens = config, tokenizer, val_tokens
        self.ranks = ranks or Ranks(torch.device(config.device))
        self.device = self.ranks.device
        self.peak_flops = hardware.peak_flops(self.device)
        if self.device.type == "cpu":
            hardware.keep_freed_memory()
        self.grad_accum_steps = config.grad_accum_steps(self.ranks.size)
        self.captures = config.as_cuda_graph(self.ranks.size)
        if model is None:
            model = GPT(config.model_config(tokenizer.vocab_size), kernels=config.kernels)
        self.model = model.to(self.device)
        self.model.transformer.recompute = config.recompute
        self.model.residual = config.residual
        # Validation and sampling use the plain module, which shares its weights with the compiled one.
        self.parallel_model = parallelize(self.model, self.ranks, config.parallel, config.compile)
        clips = {"optimizer": "triton", "max_norm": config.grad_clip} if config.optimizer == "triton" else {}
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay, config.lr, (0.9, config.beta2), self.device.type, **clips
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.watch = LossWatch(config.spike)
        if config.document_mask and tokenizer.end_of_text is None:
            raise ValueError(
                "document_mask is set, but the tokenizer has no end of text: gpt2 has one, char and byte have none"
            )
        for part in (train_tokens, val_tokens):
            check_tokens(part, self.model.config.vocab_size)
        self.windows = Windows(train_tokens, config.block_size, config.seed, self.ranks.rank, self.ranks.size)
        if not self.ranks.first:
            torch.manual_seed(config.seed + self.ranks.rank)  # the weights are the same, but dropout differs

    # -------------------------------------------------------------------------------------------------- training

    def step(self, step: int) -> Record:
        """Makes optimizer step number `step`, from 1. Raises FloatingPointError for a bad step (see `LossWatch`)."""
        config, start = self.config, time.perf_counter()
        lr = self.learning_rate(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = [self._accumulate_gradient(i) for i in range(self.grad_accum_steps)]
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._grad_norm()
        loss, norm = self.ranks.all_reduce_mean(torch.stack([torch.stack(losses).mean(), grad_norm]))
        left_out = self._update(step, loss, norm)
        seconds = time.perf_counter() - start
        tokens = config.tokens_per_step(self.ranks.size)
        flops = self.model.config.flops_per_token() * tokens / self.ranks.size  # by one rank
        return Record(
            step=step,
            tokens=step * tokens,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            step_ms=seconds * 1e3,
            tokens_per_s=tokens / seconds,
            mfu=None if self.peak_flops is None else flops / seconds / self.peak_flops,
            peak_memory_bytes=hardware.peak_memory_bytes(self.device),
            left_out=left_out,
        )

    def _grad_norm(self) -> torch.Tensor:
        """Before clipping; clips, unless the optimizer's step does."""
        if isinstance(self.optimizer, TritonAdamW):
            return self.optimizer.measure_grad_norm()
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        return norm.full_tensor() if self.config.parallel == "fsdp" and self.ranks.size > 1 else norm

    def _update(self, step: int, loss: float, norm: float) -> str | None:
        """Updates the weights with AdamW. -> None, or what is wrong with the step, in which case it may be left out."""
        problem = self.watch.problem(loss, norm)
        # An overflow in float16 is not an error of the run: the scaler skips the update and reduces its scale.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if problem is not None:
            if self.config.bad_steps == "stop" and not overflow:
                raise FloatingPointError(
                    f"step {step}: {problem}; begin again with a lower lr, or resume and leave out such steps: "
                    "--resume RUN --bad-steps skip"
                )
            self.watch.leave_out(step, problem)
        if problem is None or overflow:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return problem

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        config = self.config
        sizes: dict[str, Any] = dict(peak=config.lr, floor=config.min_lr, warmup=config.warmup, steps=config.steps)
        if config.schedule == "wsd":
            return wsd_schedule(step, **sizes, decay=round(config.steps * config.decay_fraction))
        return cosine_schedule(step, **sizes)

    def _accumulate_gradient(self, i: int) -> torch.Tensor:
        """Makes forward and backward pass number `i` of a step, from 0, and returns its loss. The gradients of all
        passes add up to their mean."""
        idx, targets = self.windows.next_batch(self.config.batch_size)
        starts = self._document_starts(idx).to(self.device) if self.config.document_mask else None
        idx, targets = idx.to(self.device), targets.to(self.device)
        set_gradient_sync(self.parallel_model, i == self.grad_accum_steps - 1)
        if self.captures:
            graphed(self.parallel_model, idx, targets, starts, required=self.config.cuda_graph == "on")
            self.captures = False
        with self.autocast():
            more = {} if starts is None else {"document_starts": starts}
            _, loss = self.parallel_model(idx, targets, **more)
        self.scaler.scale(loss / self.grad_accum_steps).backward()
        return loss.detach()

    def _document_starts(self, idx: torch.Tensor) -> torch.Tensor:
        """The model's argument of this name, (n + 1,) int32, for idx (B, T)."""
        assert self.tokenizer.end_of_text is not None
        return document_starts(idx, self.tokenizer.end_of_text)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to the config's dtype, or no autocast for float32."""
        if self.config.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.config.dtype])

    # -------------------------------------------------------------------------------------------------- looking

    def validation_loss(self) -> float:
        """The mean loss in nats a token on a fixed set of held-out windows, computed in the dtype of training."""
        config, ranks = self.config, self.ranks
        windows = max(1, config.eval_tokens // config.block_size)
        batches = eval_batches(self.val_tokens, config.block_size, config.batch_size, windows, ranks.rank, ranks.size)
        find_starts = self._document_starts if config.document_mask else None
        with self.autocast():
            found = total_loss(self.model, batches, self.device, find_starts)
        total, tokens = ranks.all_reduce(torch.tensor(found, dtype=torch.float64))
        return total / tokens

    def hellaswag(self, examples: Sequence[Example]) -> float:
        """The `nanogpt_acc_norm`. The ranks share the examples, except with FSDP2, where only rank 0 has the
        whole model and scores all examples."""
        model, ranks = self.whole_model(), self.ranks
        if ranks.size > 1 and self.config.parallel == "fsdp":
            mine = examples if ranks.first else []
        else:
            mine = examples[ranks.rank :: ranks.size]
        right = 0.0
        if mine:
            with self.autocast():
                _, acc_norm = nanogpt_scores(model.to(self.device), self.tokenizer, mine, device=self.device)
            right = acc_norm * len(mine)
        (total,) = ranks.all_reduce(torch.tensor([right], dtype=torch.float64))
        return total / len(examples)

    def sample(self, model: GPT, prompt: str) -> str:
        """A text that `model`, from `whole_model`, generates after `prompt`."""
        with self.autocast():
            texts = generate_text(
                model.to(self.device),
                self.tokenizer,
                prompt,
                max_new_tokens=SAMPLE_TOKENS,
                temperature=0.8,
                seed=self.config.seed,
            )
        return texts[0]

    # -------------------------------------------------------------------------------------------------- keeping

    def whole_model(self) -> GPT:
        """The model with whole parameters. If ranks hold parts (FSDP2), rank 0 gets a copy on the CPU, and the others
        the model itself."""
        if self.ranks.size == 1 or self.config.parallel != "fsdp":
            return self.model
        weights = dcp.get_model_state_dict(self.model, options=WHOLE)
        if not self.ranks.first:
            return self.model
        with torch.device("meta"):
            whole = GPT(self.model.config, self.config.kernels)
        whole.origin, whole.residual = self.model.origin, self.model.residual
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        return whole

    def state_dict(self) -> dict[str, Any]:
        """On rank 0, the state besides the weights: optimizer, position in the data, every rank's random numbers.

        The optimizer's state is stored for whole parameters by name, so that any number of ranks with DDP or FSDP2 can
        resume.
        """
        table, V = self.whole_model().transformer.wte.weight.detach(), self.model.config.vocab_size
        return {
            "optimizer": dcp.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE),
            "scaler": self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
            "windows": self.windows.state_dict(),
            "random": self.ranks.gather(self._random_state()),
            # The rows of the token table beyond the vocabulary, which checkpoints leave out.
            "padding": table[V:].cpu().clone() if self.ranks.first else None,
        }

    def load_state_dict(self, model: GPT, state: dict[str, Any]) -> None:
        """Loads the saved weights of `model` and `state` on every rank. Raises ValueError if the data has changed."""
        self.windows.load_state_dict(state["windows"])
        weights = model.state_dict()
        table = weights["transformer.wte.weight"]
        with torch.no_grad():
            table[model.config.vocab_size :] = state["padding"]
        dcp.set_model_state_dict(self.model, weights, options=GIVEN_WHOLE)
        dcp.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=GIVEN_WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
        if self.ranks.rank < len(state["random"]):
            self._set_random_state(state["random"][self.ranks.rank])

    def _random_state(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random_state(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
GIVEN_WHOLE = dcp.StateDictOptions(full_state_dict=True)
