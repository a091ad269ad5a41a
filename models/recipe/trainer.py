"""Trains within a budget, saves itself every minute, and continues from there exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.recipe.model import mean_loss
from models.recipe.progress import Bar, Clock, say
from models.recipe.rows import Rows
from models.recipe.schedule import Budget, Schedule
from models.recipe.stream import BatchStream, Position, StreamSettings

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a training run is made of; ``pause_margin_seconds`` is kept back to save before a command must end."""

    stream: StreamSettings
    schedule: Schedule
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    checkpoint_seconds: float = 60.0
    validation_seconds: float = 30.0
    log_steps: int = 10
    pause_margin_seconds: float = 20.0


@dataclass(slots=True)
class Progress:
    """Where a run is. ``elapsed_seconds`` counts training alone, over all commands."""

    budget: Budget
    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    position: Position = field(default_factory=Position)
    log: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        return self.budget.fraction(self.elapsed_seconds, self.step)

    @property
    def is_finished(self) -> bool:
        return self.fraction >= 1.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Progress:
        known = dict(record)
        known["budget"] = Budget(**known["budget"])
        known["position"] = Position(**known["position"])
        return cls(**known)


def new_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW with decay on the projections' matrices alone: not on embeddings, A_log, convolutions, norms, biases."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_projection = name.endswith("_proj.weight")
        (decayed if is_projection else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    is_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=settings.schedule.peak, betas=settings.betas, fused=is_cuda)


class Trainer:
    """One run: the model, its optimizer, and where it is."""

    def __init__(self, model: Any, settings: TrainSettings, progress: Progress, workdir: Path) -> None:
        self.model = model
        self.settings = settings
        self.progress = progress
        self._path = workdir / CHECKPOINT
        self._optimizer = new_optimizer(model, settings)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device

    def save(self) -> None:
        """Replace the checkpoint in one piece, so that a killed run never leaves half of one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "progress": json.dumps(self.progress.as_json()),
        }
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._path)

    def load(self) -> bool:
        """Continue from the checkpoint if there is one; says whether."""
        if not self._path.exists():
            return False
        state = torch.load(self._path, map_location=self._device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress.from_json(json.loads(state["progress"]))
        return True

    def run(self, clock: Clock, validation: Tensor | None = None) -> bool:
        """Train until the budget is used or the command must end; says whether the run is finished."""
        if self.progress.is_finished:
            return True
        self.model.train()
        with BatchStream(self.settings.stream, self.progress.position) as stream:
            batches = iter(stream)
            first = next(batches)
            self._warm_up(first[0])
            self._loop(first, batches, clock, validation)
        self.save()
        return self.progress.is_finished

    def _warm_up(self, rows: Rows) -> None:
        """Compile every kernel outside of the budget: a step whose gradients are thrown away."""
        begin = time.monotonic()
        loss = self._loss(rows)
        torch.autograd.backward(loss)
        value = loss.item()
        self.model.zero_grad(set_to_none=True)
        say(f"kernels ready in {time.monotonic() - begin:.1f} s, loss of the first batch {value:.4f}")

    def _loop(
        self, batch: tuple[Rows, Position], batches: Iterator[tuple[Rows, Position]], clock: Clock, held: Tensor | None
    ) -> None:
        window = _Window(self)
        bar = Bar("train")
        last_save = last_validation = clock.elapsed
        begin = time.monotonic() - self.progress.elapsed_seconds
        while not self.progress.is_finished and clock.remaining > self.settings.pause_margin_seconds:
            rate = self.settings.schedule.learning_rate(self.progress.fraction)
            loss, norm = self._step(batch[0], rate)
            self._count(batch, time.monotonic() - begin)
            window.add(loss)
            if self.progress.step % self.settings.log_steps == 0 or self.progress.is_finished:
                window.close(rate, norm)
                bar.update(self.progress.fraction, window.note)
            if held is not None and clock.elapsed - last_validation > self.settings.validation_seconds:
                last_validation = clock.elapsed
                self._validate(held)
            if clock.elapsed - last_save > self.settings.checkpoint_seconds:
                last_save = clock.elapsed
                self.save()
            batch = next(batches)
        window.close(self.settings.schedule.learning_rate(self.progress.fraction), None)
        if held is not None:
            self._validate(held)
        bar.close()

    def _count(self, batch: tuple[Rows, Position], elapsed_seconds: float) -> None:
        rows, position = batch
        progress = self.progress
        progress.step += 1
        progress.tokens += rows.shape[0] * (rows.shape[1] - 1)
        progress.position = position
        progress.elapsed_seconds = elapsed_seconds

    def _to_device(self, rows: Rows) -> Tensor:
        tokens = torch.from_numpy(rows.astype("int64"))
        return tokens.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tokens

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()

    def _loss(self, rows: Rows) -> Tensor:
        with self._autocast():
            return mean_loss(self.model, self._to_device(rows))

    def _step(self, rows: Rows, rate: float) -> tuple[Tensor, Tensor]:
        """One update at a learning rate; an update whose gradient is not finite is left out."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(rows)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        if self._device.type == "cuda":
            # the fused optimizer looks at this flag on the device: no wait for the host
            self._optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif math.isfinite(norm.item()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm.detach()

    @torch.no_grad()
    def _validate(self, held: Tensor) -> None:
        with self._autocast():
            size = self.settings.stream.rows_per_batch
            losses = [mean_loss(self.model, held[i : i + size]).item() for i in range(0, len(held), size)]
        loss = sum(losses) / len(losses)
        self.progress.validation.append({"step": self.progress.step, "tokens": self.progress.tokens, "loss": loss})
        say(f"held-out loss {loss:.4f} nats per token after {self.progress.tokens / 1e6:.1f} M tokens")


class _Window:
    """The mean loss and throughput since the last line of the log; reading them waits for the device once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self._begin_tokens = trainer.progress.tokens
        self._begin_seconds = trainer.progress.elapsed_seconds
        self.note = ""

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def close(self, rate: float, norm: Tensor | None) -> None:
        if not self._losses:
            return
        progress = self._trainer.progress
        loss = torch.stack(self._losses).mean().item()
        seconds = max(progress.elapsed_seconds - self._begin_seconds, 1e-9)
        speed = (progress.tokens - self._begin_tokens) / seconds
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.elapsed_seconds, 3),
            "loss": loss,
            "learning_rate": rate,
            "tokens_per_second": round(speed, 1),
        }
        if norm is not None:
            record["gradient_norm"] = norm.item()
        progress.log.append(record)
        self.note = (
            f"step {progress.step}  loss {loss:.4f}  lr {rate:.2e}  {speed / 1e3:.1f} k tokens/s  "
            f"{progress.tokens / 1e6:.1f} M tokens  epoch {progress.position.epoch}"
        )
        self._losses = []
        self._begin_tokens, self._begin_seconds = progress.tokens, progress.elapsed_seconds
