"""Training with a tiny model on the CPU: budgets, exact resumption, export, evaluation and the card."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models.train
from models.recipe import trainer as trainer_module
from models.recipe.evaluate import batches_by_length, load_exported
from models.recipe.export import export_model, pack, unpack
from models.recipe.model import mean_loss, new_config, new_model, token_losses
from models.recipe.progress import Clock
from models.recipe.schedule import Budget, Schedule
from models.recipe.stream import StreamSettings
from models.recipe.trainer import Progress, Trainer, TrainSettings, new_optimizer
from tests.models.conftest import TinyRun

CPU = torch.device("cpu")


def tiny_model(seed: int = 0):  # type: ignore[no-untyped-def]
    return new_model(new_config(vocab_size=512, hidden_size=16, num_layers=2), seed, CPU)


def settings_of(tiny_run: TinyRun) -> TrainSettings:
    stream = StreamSettings(
        tiny_run.corpus, tiny_run.tokenizer, rows_per_batch=4, row_length=32, shard_bytes=20_000, workers=0
    )
    return TrainSettings(stream, Schedule(1e-2), log_steps=5, pause_margin_seconds=0.0)


class StepClock(Clock):
    """A clock that runs out when a trainer has made so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(1e9)
        self.trainer: Trainer | None = None
        self._steps = steps

    @property
    def remaining(self) -> float:
        assert self.trainer is not None
        return self._steps - self.trainer.progress.step


def run_to(trainer: Trainer, steps: int) -> bool:
    clock = StepClock(steps)
    clock.trainer = trainer
    return trainer.run(clock)


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    schedule = Schedule(peak=1.0, warmup_share=0.1, floor_share=0.01)

    assert schedule.learning_rate(0.0) == pytest.approx(0.01)
    assert schedule.learning_rate(0.05) == pytest.approx(0.5)
    assert schedule.learning_rate(0.1) == pytest.approx(1.0)
    assert schedule.learning_rate(1.0) == pytest.approx(0.01)
    rates = [schedule.learning_rate(0.1 + 0.9 * i / 100) for i in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_budget_counts_seconds_or_steps() -> None:
    assert Budget(seconds=10).fraction(2.5, 999) == 0.25
    assert Budget(steps=10).fraction(999, 5) == 0.5
    assert Budget(seconds=10).fraction(11, 0) == 1.0
    with pytest.raises(ValueError, match="either of seconds or of steps"):
        Budget()


def test_decay_touches_projections_alone(tiny_run: TinyRun) -> None:
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    decayed, free = new_optimizer(model, settings_of(tiny_run)).param_groups

    assert decayed["weight_decay"] > 0
    assert free["weight_decay"] == 0
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert all(not names[id(p)].endswith("_proj.weight") for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_training_lowers_the_loss_and_uses_the_whole_budget(tiny_run: TinyRun, tmp_path: Path) -> None:
    trainer = Trainer(tiny_model(), settings_of(tiny_run), Progress(Budget(steps=40)), tmp_path)

    assert run_to(trainer, 1_000)
    log = trainer.progress.log
    assert trainer.progress.step == 40
    assert trainer.progress.tokens == 40 * 4 * 32
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["learning_rate"] < 0.05 * 1e-2


def test_a_resumed_run_ends_in_the_same_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = settings_of(tiny_run)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Trainer(tiny_model(), settings, Progress(Budget(steps=24)), tmp_path / "whole")
    run_to(whole, 1_000)

    first = Trainer(tiny_model(), settings, Progress(Budget(steps=24)), tmp_path / "parts")
    assert not run_to(first, 11)
    second = Trainer(tiny_model(seed=5), settings, Progress(Budget(steps=999)), tmp_path / "parts")
    assert second.load()
    assert second.progress.step == 11
    assert run_to(second, 1_000)

    assert second.progress.step == 24
    assert second.progress.position == whole.progress.position
    for (name, expected), actual in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_budget_of_seconds_ends_by_the_clock(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # every look at the clock finds it a fiftieth of a second later
    ticks = itertools.count()
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 50))
    trainer = Trainer(tiny_model(), settings_of(tiny_run), Progress(Budget(seconds=0.5)), tmp_path)

    assert trainer.run(Clock(60))
    assert 0.5 <= trainer.progress.elapsed_seconds < 0.6
    assert trainer.progress.log[-1]["learning_rate"] < 0.1 * 1e-2


def test_an_update_that_is_not_finite_is_left_out(tiny_run: TinyRun, tmp_path: Path) -> None:
    trainer = Trainer(tiny_model(), settings_of(tiny_run), Progress(Budget(steps=3)), tmp_path)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * float("nan"))

    run_to(trainer, 1_000)

    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.gpu
def test_training_on_a_gpu_lowers_the_loss_in_bf16(tiny_run: TinyRun, tmp_path: Path) -> None:
    model = tiny_model().cuda()
    trainer = Trainer(model, settings_of(tiny_run), Progress(Budget(steps=40)), tmp_path)

    assert run_to(trainer, 1_000)
    assert trainer.progress.log[-1]["loss"] < trainer.progress.log[0]["loss"] - 0.5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_bf16_autocast_stays_near_fp32() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 512, (3, 33))
    exact = mean_loss(model, tokens)

    with torch.autocast("cpu", torch.bfloat16):
        rounded = mean_loss(model, tokens)
    torch.autograd.backward(rounded)

    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_shards_are_even_and_keep_the_recurrence_exact(tmp_path: Path) -> None:
    model = new_model(new_config(vocab_size=8192, hidden_size=384, num_layers=12), 0, CPU)

    export_model(model, tmp_path)
    loaded = load_exported(tmp_path, CPU)

    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) <= 4
    assert max(sizes) < 15_000_000
    assert sum(sizes) < 32_000_000
    assert torch.equal(loaded.backbone.layers[3].mixer.A_log, model.backbone.layers[3].mixer.A_log)
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings.bfloat16().float())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_losses_agree_with_the_models_own() -> None:
    model = tiny_model().eval()
    tokens = torch.randint(0, 512, (3, 33))

    own = model(tokens, labels=tokens).loss

    assert mean_loss(model, tokens).item() == pytest.approx(own.item(), rel=1e-5)
    assert token_losses(model, tokens).mean().item() == pytest.approx(own.item(), rel=1e-5)


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [5, 100, 7, 7, 300, 1]
    batches = list(batches_by_length(lengths, 20))

    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches)


def test_packing_for_transfer_is_reversible(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "a.png", "b.json"):
        (source / name).write_bytes(name.encode())

    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "copy")

    assert len(list((tmp_path / "packed").iterdir())) == 3
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()
    }


def test_the_whole_recipe_in_miniature(tmp_path: Path) -> None:
    base = ["--workdir", str(tmp_path / "work"), "--device", "cpu", "--workers", "1", "--seconds", "600"]
    shape = [
        "--packages",
        "click,pluggy",
        "--heldout-per-10000",
        "1000",
        "--vocab-size",
        "300",
        "--tokenizer-bytes",
        "50000",
    ]
    shape += ["--hidden-size", "16", "--layers", "1", "--rows", "2", "--row-length", "16", "--max-steps", "12"]

    assert models.train.main([*base, *shape, "--out", str(tmp_path / "out")]) == 0

    folder = tmp_path / "work" / models.train.DEFAULT_NAME
    card = (folder / "README.md").read_text()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    assert training["step"] == 12
    assert f"{training['parameters']:,} parameters" in card
    assert len(evaluation["completions"]) == 10
    assert len(evaluation["trained"]["bits"]) == len(evaluation["baselines"]["ngram_bits"])
    assert {"model.safetensors", "config.json", "tokenizer.json", "loss_curve.png", "loss_by_position.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "rest.tar"}
