"""Training under Lightning: the fast loop inside `training_step`, the slow step Lightning's. No mathematics here."""

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pyro.nn import PyroModule
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ltm_pyro.contracts import Batch, Guide, Model, ThoughtShape, UsageError, seeded
from ltm_pyro.data import PackedDataset
from ltm_pyro.elbo import elbo_terms
from ltm_pyro.flops import ours
from ltm_pyro.inference import LocalInference
from ltm_pyro.local import fit, learn
from ltm_pyro.rates import Points, decay, interpolate, parameter_groups, warmup_cosine

SHOWN = {"train/loss": "loss", "val/bound": "held-out bound", "val/kl": "KL"}  # the progress line's figures, nats/token
COLUMNS = (
    *("step", "seconds", "train/loss", "train/kl", "train/fast_rate", "train/slow_rate", "train/tokens_per_second"),
    *("val/bound", "val/kl", "train/flops", "train/fast_steps"),
)


@dataclass(frozen=True, kw_only=True)
class SlowRate:
    """AdamW on the decoder and the prior's parameters (arXiv 2502.01567, algorithm 1, the outer step).

    Args:
        rate: η_slow, the peak learning rate.
        warmup: fraction of training over which the rate rises from 0.
        floor: where the cosine ends, as a fraction of the peak.
        weight_decay: on matrices; norms have none.
        betas: Adam's averaging factors.
    """

    rate: float = 4e-4
    warmup: float = 0.02
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if not (self.rate > 0 and 0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise UsageError(f"`slow` needs rate > 0, warmup in [0, 1) and floor in [0, 1], got {self}.")


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Schedules over training: (progress, value) points with straight lines between; None keeps local inference's own.

    Args:
        steps: T_fast, rounded; while it is 0 the decoder trains without thoughts (the autoregressive warm start).
        rate: the fast rate (the paper's: 0.3 to 0.34).
        log_var: the start's log-variance, relative to the prior's (narrow to prior: −5 to 0).
        kl_weight: of the KL in the objective.
        particles: draws of z per fast step, rounded.
    """

    steps: Points | None = None
    rate: Points | None = None
    log_var: Points | None = None
    kl_weight: Points | None = None
    particles: Points | None = None

    def at(self, progress: float, inference: LocalInference) -> LocalInference:
        """Local inference at a fraction of training."""
        values: dict[str, Any] = {
            name: interpolate(points, progress) for name, points in asdict(self).items() if points
        }
        if "log_var" in values:
            values["start"] = replace(inference.start, log_var=values.pop("log_var"))
        values.update({name: round(values[name]) for name in ("steps", "particles") if name in values})
        return replace(inference, **values)


class LTMModule(pl.LightningModule):
    """A Latent-Thought Language Model in training.

    Args:
        decoder: makes p(x | z)'s network for a vocabulary.
        prior: makes p(z) for a `ThoughtShape`.
        joint: makes the Pyro model from prior and decoder.
        guide: makes q's family for the model.
        inference: local inference while training.
        evaluation: local inference while validating, and the default of ``ltm evaluate``.
        slow: the slow step.
        curriculum: how local inference changes over training.
        max_flops: training ends when it has spent so many floating-point operations.
        vocabulary: V; the data's when not given.
        seed: of the noise, together with epoch, batch and rank.
    """

    flops: Tensor

    def __init__(
        self,
        decoder: Callable[[int], nn.Module],
        prior: Callable[[ThoughtShape], PyroModule],
        joint: Callable[[PyroModule, nn.Module], PyroModule],
        guide: Callable[[Model], Guide],
        inference: LocalInference = LocalInference(),  # noqa: B008 - frozen
        evaluation: LocalInference = LocalInference(steps=32, rate=0.1),  # noqa: B008
        slow: SlowRate = SlowRate(),
        curriculum: Curriculum = Curriculum(),
        max_flops: float | None = None,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if vocabulary is None:
            raise UsageError("The model has no vocabulary: set `model.vocabulary`, or give packed data.")
        network = decoder(vocabulary)
        self.model: Any = joint(prior(cast(ThoughtShape, network.thought_shape)), network)
        self.guide = guide(self.model)
        self.inference, self.evaluation, self.slow, self.seed = inference, evaluation, slow, seed
        self.curriculum, self.max_flops = curriculum, max_flops
        self.register_buffer("flops", torch.zeros((), dtype=torch.float64))  # spent so far; travels in checkpoints

    @property
    def progress(self) -> float:
        """The fraction of training that is done, by steps, epochs, time or FLOPs, whichever is furthest."""
        trainer: Any = self.trainer
        done = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else [0.0]
        for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):
            elapsed, left = timer.time_elapsed(), timer.time_remaining()
            done += [] if left is None else [elapsed / (elapsed + left)]
        if (trainer.max_epochs or 0) > 0:
            batches = trainer.max_epochs * trainer.num_training_batches
            done.append(trainer.global_step * trainer.accumulate_grad_batches / batches)
        if self.max_flops:
            done.append(self.flops.item() / self.max_flops)
        return min(max(done), 1.0)

    def configure_optimizers(self) -> Any:
        """AdamW with the slow schedule, moved by `progress`."""
        slow = self.slow
        groups = parameter_groups(self.model.named_parameters(), decay(slow.weight_decay))
        optimizer = torch.optim.AdamW(groups, lr=slow.rate, betas=slow.betas, foreach=True)
        schedule = LambdaLR(optimizer, lambda _: warmup_cosine(self.progress, slow.warmup, slow.floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Fits q to the batch; returns −ELBO in nats per token, which the slow step follows."""
        inference = self.curriculum.at(self.progress, self.inference)
        self.model.decoder.listening = inference.steps > 0
        with seeded(self.seed, self.current_epoch, index, self.global_rank):
            loss, _, info = learn(self.model, self.guide, batch, inference)
        tokens = batch.mask_BT.sum()
        kl = info.kl_NB[-1].sum() / tokens if len(info.kl_NB) else torch.zeros(())
        self.flops += batch.inputs_BT.numel() * ours(self.model.decoder, batch.inputs_BT.shape[1], inference).total
        self.log_dict(
            {
                "train/loss": loss.detach() / tokens,
                "train/kl": kl,
                "train/fast_rate": inference.rate,
                "train/slow_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "train/fast_steps": float(inference.steps),
                "train/flops": self.flops.clone(),
            }
        )
        return loss / tokens

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """Ends training at ``max_flops``."""
        if self.max_flops and self.progress >= 1:
            self.trainer.should_stop = True

    def on_validation_start(self) -> None:
        """The bound is of the whole model, also while it trains without thoughts."""
        self.model.decoder.listening = True

    def validation_step(self, batch: Batch, index: int) -> None:
        """Logs the honest bound: one draw after q is final."""
        if torch.is_inference_mode_enabled():
            raise UsageError("Validation fits q and needs gradients: build the Trainer with `inference_mode=False`.")
        with seeded(self.seed, index):
            state, _ = fit(self.model, self.guide, batch, self.evaluation)
            terms = elbo_terms(self.model, self.guide, batch, state.parameters)
        tokens = int(batch.mask_BT.sum())
        figures = {"val/bound": -terms.elbo_B.sum() / tokens, "val/kl": terms.kl_B.sum() / tokens}
        self.log_dict(figures, batch_size=tokens, sync_dist=True)


class PackedData(pl.LightningDataModule):
    """Batches of a packed directory (``ltm data pack``).

    Args:
        directory: the packed data.
        batch_size: B, sequences per step.
        workers: processes that read ahead; 0 reads in the training process.
        seed: of the order.
    """

    def __init__(self, directory: str, batch_size: int = 32, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UsageError(f"`data` needs batch_size ≥ 1 and workers ≥ 0, got {batch_size} and {workers}.")
        self.directory, self.batch_size, self.workers, self.seed = directory, batch_size, workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches, in an order of each epoch's own."""
        dataset = PackedDataset.open(self.directory, "train")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=len(dataset) >= self.batch_size,
            num_workers=self.workers,
            collate_fn=dataset.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out sequence, in the order of the shards."""
        dataset = PackedDataset.open(self.directory, "val")
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=dataset.collate)


class Progress(Callback):
    """One line on standard error: how far, how fast, how good, how long still; ten in all where that is no terminal."""

    def __init__(self) -> None:
        columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
        texts = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        console = Console(stderr=True)
        self._bar = RichProgress(*columns, *texts, console=console, disable=not console.is_terminal)
        self._clock, self._tenths = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Shows the bar."""
        self._task = self._bar.add_task("training", total=1.0, figures="")
        self._bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Starts the clock of one step."""
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        """Logs tokens per second and refreshes the line."""
        speed = batch.inputs_BT.numel() / (time.perf_counter() - self._clock)
        module.log("train/tokens_per_second", speed)
        if index % trainer.log_every_n_steps:
            return
        figures = trainer.callback_metrics
        text = "  ".join(f"{name} {figures[k]:.3f}" for k, name in SHOWN.items() if k in figures)
        self._show(module.progress, f"{speed:,.0f} tokens/s  {text}")

    def _show(self, progress: float, figures: str) -> None:
        self._bar.update(self._task, completed=progress, figures=figures)
        if self._bar.disable and int(10 * progress) > self._tenths:
            self._tenths = int(10 * progress)
            print(f"training {progress:4.0%}  {figures}", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leaves the terminal as it was, also after Ctrl-C."""
        self._bar.stop()


class MetricsFile(Logger):
    """``metrics.csv`` of a run: one row per logged step, appended to when a run is resumed; its seconds go on too."""

    name = version = ""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._began: float | None = None

    def _seconds(self) -> float:
        """Seconds since the first row, those between an interruption and its resumption left out."""
        if self._began is None:
            self._began = time.monotonic() - self._last_seconds()
        return round(time.monotonic() - self._began, 3)

    def _last_seconds(self) -> float:
        if not self._path.exists():
            return 0.0
        with self._path.open(newline="") as file:
            return max((float(row["seconds"]) for row in csv.DictReader(file)), default=0.0)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row; columns that a row has no figure for stay empty."""
        seconds, new = self._seconds(), not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow({**metrics, "step": step, "seconds": seconds})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's ``config.yaml`` already says them."""


class LastCheckpoint(Callback):
    """Keeps one checkpoint that is always whole: written beside the old one, then renamed over it.

    It is written every ``every`` steps, at the end, and on Ctrl-C, SIGTERM or an error. Recipe and tokenizer travel in
    it as plain strings, so that a checkpoint alone is a run and loads without unpickling anything.
    """

    def __init__(self, path: Path, recipe: str, tokenizer: str, every: int = 500) -> None:
        self._path, self._every = path, every
        self._texts = {"recipe": recipe, "tokenizer": tokenizer}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the texts."""
        checkpoint["ltm_pyro"] = self._texts

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves at every ``every``-th step."""
        if trainer.global_step and trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves the result."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Saves what there is, once training has begun."""
        if trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        new = self._path.with_suffix(".new")
        try:
            trainer.save_checkpoint(new, weights_only=False)
            if trainer.is_global_zero:
                new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
