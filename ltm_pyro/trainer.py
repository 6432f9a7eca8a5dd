"""Training under Lightning: the fast loop inside `training_step`, the slow step Lightning's. No mathematics here."""

import csv
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

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
from ltm_pyro.curriculum import Curriculum, SlowRate
from ltm_pyro.data import PackedDataset, read_manifest
from ltm_pyro.elbo import elbo_terms
from ltm_pyro.flops import ours
from ltm_pyro.inference import LocalInference
from ltm_pyro.local import Learned, begin, fit, learn
from ltm_pyro.rates import decay, parameter_groups, warmup_cosine
from ltm_pyro.store import LocalStore

SHOWN = {"train/loss": "loss", "val/bound": "held-out bound", "val/kl": "KL"}  # the progress line's figures, nats/token
COLUMNS = (
    *("step", "seconds", "train/loss", "train/kl", "train/fast_rate", "train/slow_rate", "train/tokens_per_second"),
    *("val/bound", "val/kl", "train/flops", "train/fast_steps"),
)


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
        keep_local: keeps every sequence's q between epochs, in ``memory`` (and checkpoints) or in files of this folder;
            by default q starts anew with every batch, as in the paper.
        on_nonfinite: what a sequence without a finite ELBO does to training: ``stop`` it, or ``skip`` the batch.
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
        slow: SlowRate = SlowRate(),  # noqa: B008
        curriculum: Curriculum = Curriculum(),  # noqa: B008
        max_flops: float | None = None,
        keep_local: str | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
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
        self.curriculum, self.max_flops, self.on_nonfinite = curriculum, max_flops, on_nonfinite
        self.keep_local = keep_local
        self.store: LocalStore | None = None
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

    def setup(self, stage: str) -> None:
        """Opens the store of persistent local parameters, before a checkpoint is loaded into it."""
        if self.keep_local and stage == "fit":
            folder = None if self.keep_local == "memory" else Path(self.keep_local)
            self.store = LocalStore(cast(Any, self.trainer).datamodule.sequences, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the store holds in memory."""
        if self.store:
            checkpoint["local"] = self.store.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        if self.store:
            self.store.load_state_dict(checkpoint.get("local", {}))

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        """Fits q to the batch; returns −ELBO in nats per token, which the slow step follows."""
        inference = self.curriculum.at(self.progress, self.inference)
        self.model.decoder.listening = inference.steps > 0
        self.flops += batch.inputs_BT.numel() * ours(self.model.decoder, batch.inputs_BT.shape[1], inference).total
        with seeded(self.seed, self.current_epoch, index, self.global_rank):
            learned = self._learn(batch, inference)
        self._ids_B = batch.ids_B
        if not learned.loss.isfinite():
            self._unsound("ELBO", batch.ids_B[~learned.sound_B])
            return None
        tokens = batch.mask_BT.sum()
        self.log_dict(
            {
                "train/loss": learned.loss.detach() / tokens,
                "train/kl": learned.terms.kl_B.sum() / tokens,
                "train/fast_rate": inference.rate,
                "train/slow_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "train/fast_steps": float(inference.steps),
                "train/flops": self.flops.clone(),
            }
        )
        return learned.loss / tokens

    def _learn(self, batch: Batch, inference: LocalInference) -> Learned:
        if self.store is None:
            return learn(self.model, self.guide, batch, inference)
        state = self.store.recall(batch.ids_B, begin(self.model, self.guide, batch, inference))
        learned = learn(self.model, self.guide, batch, inference, state)
        self.store.keep(batch.ids_B, learned.state)
        return learned

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets no gradient that is not finite reach the weights."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.stack([g.isfinite().all() for g in gradients]).all():
            self._unsound("gradient", self._ids_B)
            optimizer.zero_grad()

    def _unsound(self, what: str, ids_b: Tensor) -> None:
        problem = f"No finite {what} at step {self.global_step} for the sequences {ids_b.tolist()}"
        if self.on_nonfinite == "stop":
            raise UsageError(f"{problem}: lower the rates, remove them, or set model.on_nonfinite to skip.")
        warnings.warn(f"{problem}: the batch is skipped.", stacklevel=2)

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

    @property
    def sequences(self) -> int:
        """How many sequences there are to train on."""
        return read_manifest(self.directory).splits["train"].sequences

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

    def __init__(self, path: Path, resumed: bool = False) -> None:
        super().__init__()
        self._path, self._began = path, time.monotonic()
        if resumed and path.exists():
            with path.open(newline="") as file:
                self._began -= max((float(row["seconds"]) for row in csv.DictReader(file)), default=0.0)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row; columns that a row has no figure for stay empty."""
        seconds, new = round(time.monotonic() - self._began, 3), not self._path.exists()
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
        if not all(p.isfinite().all() for p in trainer.lightning_module.parameters()):
            return  # never over a good checkpoint
        new = self._path.with_suffix(".new")
        try:
            trainer.save_checkpoint(new, weights_only=False)
            if trainer.is_global_zero:
                new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
