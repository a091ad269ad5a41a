"""The stages of a training run in order, each cached in the working directory."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.recipe import baselines, export
from models.recipe.card import write_card
from models.recipe.corpus import CorpusSettings, Documents, collect
from models.recipe.evaluate import EvaluationSettings, evaluate, heldout_rows
from models.recipe.model import new_config, new_model, num_parameters
from models.recipe.plots import plot_positions, plot_training
from models.recipe.progress import Clock, say, stage
from models.recipe.schedule import Budget, Schedule
from models.recipe.stream import ShardBuilder, StreamSettings
from models.recipe.tokenizer import load_tokenizer, save_tokenizer_files, train_tokenizer
from models.recipe.trainer import Progress, Trainer, TrainSettings

ROOT = Path(__file__).resolve().parent.parent.parent

# what a command must have left to begin an evaluation: less means that the next command does it
EVALUATION_SECONDS = 45.0
VALIDATION_BATCHES = 2

_LASTING_OPTIONS = (
    "name", "packages", "heldout_per_10000", "vocab_size", "tokenizer_bytes",
    "hidden_size", "layers", "rows", "row_length", "learning_rate", "fim_share", "seed",
)  # fmt: skip


class Run:
    """One command: its options, its clock and where its files lie."""

    def __init__(self, options: Namespace, start: float) -> None:
        """``start``: the ``time.monotonic()`` at which the command began."""
        self._options = options
        self._clock = Clock(options.seconds, start)
        self._corpus = options.workdir / "corpus"
        self._tokenizer = options.workdir / "tokenizer"
        self._model_folder = options.workdir / options.name
        self._workers = options.workers if options.workers is not None else (os.cpu_count() or 1)
        self._device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._baselines: subprocess.Popen[bytes] | None = None

    def execute(self) -> int:
        """Run the stage asked for; 0 when it is done, 3 when training paused and wants ``--resume``."""
        if self._options.stage == "unpack":
            export.unpack(self._options.out, ROOT / "models" / self._options.name)
            return 0
        self._options.workdir.mkdir(parents=True, exist_ok=True)
        self._recall_options()
        with ExitStack() as cleanup:
            cleanup.callback(self._stop_baselines)
            return self._execute()

    def _execute(self) -> int:
        wanted = self._options.stage
        if wanted in ("all", "prepare"):
            self._prepare()
        if wanted == "prepare":
            self._wait_for_baselines(reserved_seconds=0.0)
        if wanted in ("all", "train") and not self._train():
            # not cooled down, but safe should the machine be lost before the next command
            self._export()
            return 3
        if wanted in ("all", "train", "export"):
            self._export()
        if wanted in ("all", "evaluate"):
            self._evaluate()
        if wanted == "card":
            self._write_card()
        return 0

    def _recall_options(self) -> None:
        """What shapes a run is chosen when it begins; later commands take it from there."""
        path = self._options.workdir / "options.json"
        begins = self._options.stage in ("all", "prepare", "train") and not self._options.resume
        if begins or not path.exists():
            path.write_text(json.dumps({name: getattr(self._options, name) for name in _LASTING_OPTIONS}, indent=1))
            return
        for name, value in json.loads(path.read_text()).items():
            setattr(self._options, name, value)

    def _prepare(self) -> None:
        options = self._options
        with stage("collect data", self._clock):
            only = frozenset(name for name in options.packages.lower().split(",") if name)
            settings = CorpusSettings(options.heldout_per_10000, only=only, workers=self._workers)
            summary = collect(self._corpus, settings)
            say(f"training {summary['train']}, held out {summary['heldout']}, refused {summary['refused_files']}")
        self._start_baselines()
        if not (self._tokenizer / "tokenizer.json").exists():
            with stage("train tokenizer", self._clock):
                documents = Documents(self._corpus, "train")
                tokenizer = train_tokenizer(documents, options.vocab_size, options.tokenizer_bytes, options.seed)
                save_tokenizer_files(tokenizer, self._tokenizer)

    def _start_baselines(self) -> None:
        """Measure what needs no GPU beside the training."""
        if (self._corpus / baselines.RESULT).exists():
            return
        command = [sys.executable, "-m", "models.recipe.baselines", str(self._corpus), str(max(1, self._workers // 2))]
        self._baselines = subprocess.Popen(command, cwd=ROOT)

    def _stop_baselines(self) -> None:
        if self._baselines is not None and self._baselines.poll() is None:
            self._baselines.terminate()
            self._baselines.wait()

    def _wait_for_baselines(self, reserved_seconds: float) -> None:
        if self._baselines is None:
            return
        with stage("wait for the baselines", self._clock):
            try:
                self._baselines.wait(timeout=max(1.0, self._clock.remaining - reserved_seconds))
            except subprocess.TimeoutExpired:
                say("the baselines take longer than this command may")

    def _settings(self) -> TrainSettings:
        options = self._options
        stream = StreamSettings(
            self._corpus,
            self._tokenizer / "tokenizer.json",
            rows_per_batch=options.rows,
            row_length=options.row_length,
            fim_share=options.fim_share,
            seed=options.seed,
            workers=0 if self._workers <= 1 else max(1, min(8, self._workers - 4)),
        )
        return TrainSettings(stream, Schedule(options.learning_rate))

    def _budget(self) -> Budget:
        options = self._options
        if options.max_steps is not None:
            return Budget(steps=options.max_steps)
        # the first batch compiles the kernels, which counts for the command and not for the budget
        left = self._clock.remaining - options.reserve_seconds - options.compile_seconds
        return Budget(seconds=options.train_seconds or max(1.0, left))

    def _trainer(self, settings: TrainSettings) -> Trainer:
        options = self._options
        vocab_size = load_tokenizer(settings.stream.tokenizer).get_vocab_size()
        model = new_model(new_config(vocab_size, options.hidden_size, options.layers), options.seed, self._device)
        return Trainer(model, settings, Progress(self._budget()), options.workdir)

    def _train(self) -> bool:
        torch.set_float32_matmul_precision("high")
        settings = self._settings()
        trainer = self._trainer(settings)
        if self._options.resume and trainer.load():
            say(f"resumed at step {trainer.progress.step}, {100 * trainer.progress.fraction:.1f} % of the budget used")
        say(f"{num_parameters(trainer.model):,} parameters on {self._device}, {trainer.progress.budget}")
        tokenizer = load_tokenizer(settings.stream.tokenizer)
        num_rows = VALIDATION_BATCHES * settings.stream.rows_per_batch
        held = heldout_rows(tokenizer, self._corpus, settings.stream.row_length + 1)[:num_rows].to(self._device)
        with stage("train", self._clock):
            finished = trainer.run(self._clock, held if len(held) else None)
        if not finished:
            say(f"paused at {100 * trainer.progress.fraction:.1f} % of the budget: run again with --resume")
        return finished

    def _export(self) -> None:
        settings = self._settings()
        trainer = self._trainer(settings)
        if not trainer.load():
            raise FileNotFoundError(f"no checkpoint in {self._options.workdir}: train first")
        with stage("export", self._clock):
            export.export_model(trainer.model, self._model_folder)
            for path in self._tokenizer.iterdir():
                shutil.copy(path, self._model_folder / path.name)
            shutil.copy(self._corpus / "data.json", self._model_folder / "data.json")
            record = self._training_record(trainer, settings)
            (self._model_folder / "training.json").write_text(json.dumps(record, indent=1))
            plot_training(record["log"], record["validation"], self._model_folder / "loss_curve.png")
            self._pack()

    def _training_record(self, trainer: Trainer, settings: TrainSettings) -> dict[str, Any]:
        progress, stream = trainer.progress, settings.stream
        shards = len(ShardBuilder(stream).shards(progress.position.epoch))
        is_cuda = self._device.type == "cuda"
        return {
            **progress.as_json(),
            "epochs": progress.position.epoch + progress.position.shard / shards,
            "parameters": num_parameters(trainer.model),
            "weight_bytes": export.weight_bytes(self._model_folder),
            "device": torch.cuda.get_device_name() if is_cuda else "CPU",
            "precision": "fp32 weights, bf16 autocast" if is_cuda else "fp32",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "config": json.loads((self._model_folder / "config.json").read_text()),
            "settings": {
                **asdict(settings.schedule),
                "betas": settings.betas,
                "weight_decay": settings.weight_decay,
                "clip_norm": settings.clip_norm,
                "rows_per_batch": stream.rows_per_batch,
                "row_length": stream.row_length,
                "fim_share": stream.fim_share,
                "seed": stream.seed,
            },
        }

    def _evaluate(self) -> None:
        if self._clock.remaining < EVALUATION_SECONDS:
            say("too little time is left to evaluate: run again with --stage evaluate")
            return
        self._wait_for_baselines(EVALUATION_SECONDS)
        with stage("evaluate", self._clock):
            settings = EvaluationSettings(
                self._corpus, self._model_folder, row_length=self._options.row_length, workers=self._workers
            )
            results = evaluate(settings, self._device, self._model_folder / "evaluation.json")
            if results["by_position"]["buckets"]:
                plot_positions(results["by_position"], self._model_folder / "loss_by_position.png")
        self._write_card()

    def _write_card(self) -> None:
        with stage("card", self._clock):
            say(f"wrote {write_card(self._model_folder)}")
            self._pack()

    def _pack(self) -> None:
        if self._options.out is not None:
            export.pack(self._model_folder, self._options.out)
