"""The two pictures of the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def _window_means(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def plot_training(log: list[dict[str, float]], validation: list[dict[str, float]], path: Path) -> None:
    """Training and held-out loss, and the learning rate, over the tokens seen."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    tokens = [record["tokens"] / 1e6 for record in log]
    losses = [record["loss"] for record in log]
    axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, _window_means(losses, 20), color="tab:blue", label="training (half of it fill-in-the-middle)")
    if validation:
        axes.plot(
            [record["tokens"] / 1e6 for record in validation],
            [record["loss"] for record in validation],
            "o-",
            color="tab:orange",
            markersize=3,
            label="held-out files (plain text)",
        )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(top=min(max(losses), 2.5 * min(losses)) if losses else None)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(tokens, [record["learning_rate"] for record in log], color="tab:gray", linestyle=":", linewidth=1)
    rates.set_ylabel("learning rate (dotted)")
    rates.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_positions(result: dict[str, Any], path: Path) -> None:
    """Held-out loss by position, the end of the training length marked."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    buckets = result["buckets"]
    centres = [(bucket["begin"] + bucket["end"]) / 2 for bucket in buckets]
    losses = [bucket["loss"] for bucket in buckets]
    errors = [bucket["standard_error"] for bucket in buckets]
    axes.errorbar(centres, losses, yerr=errors, fmt="o-", markersize=3, linewidth=1, label="state runs on")
    resets = [bucket["reset_loss"] for bucket in buckets]
    train_length = result["train_length"]
    axes.plot(centres, resets, ".--", linewidth=0.8, label=f"the same tokens, state reset every {train_length:,}")
    axes.axvline(train_length, color="tab:red", linewidth=1, label=f"training length, {train_length:,} tokens")
    axes.set_xlabel("position in the row (tokens)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
