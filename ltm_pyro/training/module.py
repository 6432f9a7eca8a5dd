"""The Lightning module: `training_step` runs the fast loop, and Lightning takes the slow step. No mathematics here."""

import json
import math
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR

from ltm_pyro.contracts import Batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.cuda_graphs import check_device
from ltm_pyro.inference.elbo import Draws, elbo_terms, missing_bound
from ltm_pyro.inference.global_latents import fix_global_draws, global_kl
from ltm_pyro.inference.learning_rates import parameter_groups, slow_parameters, warmup_cosine
from ltm_pyro.inference.local import infer_local, init, training_loss
from ltm_pyro.inference.local_store import LocalStore
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.training.flops import flops_per_token
from ltm_pyro.training.model_config import build_model
from ltm_pyro.training.schedules import Curriculum, SlowRate
from ltm_pyro.utils.rng import seeded

NONFINITE = "nonfinite.jsonl"  # in the run: the steps and sequences that had no finite ELBO or gradient


class LTMModule(pl.LightningModule):
    """A Latent-Thought Language Model in training.

    Args:
        slow: the slow step.
        curriculum: how local inference changes over training.
        max_flops: a budget of floating-point operations, after which training ends.
        keep_local: stores q of every sequence between epochs, in ``memory`` (and in checkpoints) or in files of this
            folder; by default q is initialised anew for every batch, as in the paper.
        on_nonfinite: ``stop`` training at the first ELBO or gradient that is not finite, or ``skip`` the batch.
        seed: random seed of local inference, together with epoch, batch and rank.
        **model: the arguments of `build_model`.
    """

    flops: Tensor

    def __init__(
        self,
        *,
        slow: SlowRate = SlowRate(),  # noqa: B008 - frozen
        curriculum: Curriculum = Curriculum(),  # noqa: B008
        max_flops: float | None = None,
        keep_local: str | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        seed: int = 0,
        **model: Any,
    ) -> None:
        super().__init__()
        self.model, self.guide, self.inference, self.evaluation = build_model(**model)
        self.slow, self.seed = slow, seed
        self.curriculum, self.max_flops, self.on_nonfinite = curriculum, max_flops, on_nonfinite
        self.keep_local = keep_local
        self.store: LocalStore | None = None
        self._accumulated_ids: list[Tensor] = []  # of the sequences in the gradient since the last slow step
        self._time_used = 0.0  # fraction of `max_time`, averaged over ranks
        self._skipped = False
        self.register_buffer("flops", torch.zeros((), dtype=torch.float64))  # spent so far; saved in checkpoints

    @property
    def progress(self) -> float:
        """The fraction of training that is done: the largest of those of steps, epochs, time and FLOPs."""
        trainer: Any = self.trainer
        done = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else [0.0]
        done.append(self._time_used if trainer.world_size > 1 else self._clock())
        if (trainer.max_epochs or 0) > 0:
            batches = trainer.num_training_batches  # infinite before they are counted
            steps = math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else batches
            done.append(trainer.global_step / (trainer.max_epochs * steps))
        if self.max_flops:
            done.append(self.flops.item() / self.max_flops)
        return min(max(done), 1.0)

    def _clock(self) -> float:
        """The fraction of ``max_time`` that this rank has used."""
        timers = [c for c in cast(Any, self.trainer).callbacks if isinstance(c, Timer)]
        times = [(timer.time_elapsed(), timer.time_remaining()) for timer in timers]
        return max((used / (used + left or 1.0) for used, left in times if left is not None), default=0.0)

    def configure_optimizers(self) -> Any:
        """AdamW with the slow schedule, a function of `progress`; fused unless float16 gradients are scaled."""
        slow, fused = self.slow, self.trainer.precision != "16-mixed"
        groups = parameter_groups(slow_parameters(self.model, self.guide), slow.arguments)
        optimizer = torch.optim.AdamW(groups, lr=slow.rate, betas=slow.betas, fused=fused)
        schedule = LambdaLR(optimizer, lambda _: warmup_cosine(self.progress, slow.warmup, slow.floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, which refuses to clip for a fused optimiser in mixed precision."""
        if gradient_clip_val:
            clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
            clip([x for group in optimizer.param_groups for x in group["params"]], gradient_clip_val)

    def setup(self, stage: str) -> None:
        """Counts the training sequences; opens the store of local parameters before a checkpoint is loaded into it."""
        if stage == "fit":
            self.sequences = cast(Any, self.trainer).datamodule.sequences
        if self.keep_local and stage == "fit":
            folder = None if self.keep_local == "memory" else Path(self.keep_local)
            self.store = LocalStore(self.sequences, folder)

    def on_fit_start(self) -> None:
        """Takes no step if the FLOPs are spent; refuses CUDA graphs on another device, also if needed later only."""
        if self.max_flops and self.flops >= self.max_flops:
            self.trainer.should_stop = True
        if self.inference.cuda_graph or self.evaluation.cuda_graph:
            check_device(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the local parameters that are stored in memory."""
        if self.store:
            checkpoint["local"] = self.store.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the local parameters that were stored in memory."""
        if self.store:
            self.store.load_state_dict(checkpoint.get("local", {}))

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        """Algorithm 1 for one batch: the fast loop, then −ELBO in nats per token for Lightning's slow step."""
        tokens, used, slots = self._sync_ranks(batch)
        strategy, cost = self.trainer.strategy, partial(self.cost, batch.inputs_BT.shape[1])
        inference = self.curriculum.at(self.progress, self.inference, cost)
        if not self.model.decoder.thought_shape.thoughts:  # K = 0: there are none to leave out
            inference = replace(inference, use_thoughts=True)
        if self.store is None:
            inference = inference.from_start()
        self.flops_per_batch = slots * cost(inference)  # under the name that Lightning's ThroughputMonitor reads
        self.flops += self.flops_per_batch
        with seeded(self.seed, self.current_epoch, index, self.global_rank):
            stored = None
            if self.store:
                stored = self.store.get(batch.ids_B, init(self.model, self.guide, batch, inference))
            found = training_loss(self.model, self.guide, batch, inference, stored)  # fast loop: q of every sequence
        if self.store:
            self.store.put(batch.ids_B, found.state)
        self._accumulated_ids.append(batch.ids_B)
        if strategy.reduce_boolean_decision(not found.loss.isfinite(), all=False):
            self._handle_nonfinite("ELBO", batch.ids_B[~found.is_finite_B])
            return self._zero_loss()
        loss = found.loss + batch.size / self.sequences * global_kl(self.model)  # slow step: Lightning goes backward
        share = (tokens / self.trainer.world_size).to(loss.dtype)
        loss, kl = loss / share, found.terms.kl_B.sum() / share  # their means over ranks are per token of all ranks
        everywhere = strategy.reduce(torch.stack([loss.detach(), kl]), reduce_op="mean")
        self.log_dict(
            {
                "train/loss": everywhere[0],
                "train/kl": everywhere[1],
                "train/fast_rate": inference.rate,
                "train/slow_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
                "train/fast_steps": float(inference.steps),
                "train/flops": self.flops.clone(),
                "train/padding": 1 - used / slots,
                "step": float(self.global_step),
            }
        )
        return loss

    @property
    def leaves_out_thoughts(self) -> bool:
        """Whether some stage of the training has no fast steps, so that the decoder trains without its thoughts."""
        steps = [steps for _, steps in self.curriculum.steps or [(0.0, self.inference.steps)]]
        return bool(self.model.decoder.thought_shape.thoughts) and not round(min(steps))

    def cost(self, length: int, inference: LocalInference) -> float:
        """FLOPs per token of a training step."""
        return flops_per_token(self.model.decoder, self.guide, length, inference).total

    def _zero_loss(self) -> Tensor | None:
        """No loss on one rank; on several a zero loss, so that DDP's all-reduce of gradients still runs."""
        if self.trainer.world_size == 1:
            return None
        self._skipped = True
        return torch.stack([0 * p.sum() for p in self.parameters()]).sum()

    def _sync_ranks(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Scored tokens, those that are scored or observed, and all with padding, of this step on all ranks.

        It also averages the time used over them.

        Every rank must compute the same rates, fast steps and end of training, or they would deadlock.
        """
        used_BT = batch.mask_BT | batch.observed.mask_BT
        own = [batch.mask_BT.sum(), used_BT.sum(), used_BT.new_tensor(used_BT.numel(), dtype=torch.long)]
        clock = batch.mask_BT.new_tensor(self._clock(), dtype=torch.double)
        total = self.trainer.strategy.reduce(torch.stack([*(x.double() for x in own), clock]), reduce_op="sum")
        if self.trainer.world_size > 1:
            self._time_used = total[3].item() / self.trainer.world_size
        return total[0], total[1], total[2]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps a gradient that is not finite from the weights."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and not torch.stack([g.isfinite().all() for g in gradients]).all():  # on all ranks alike
            self._handle_nonfinite("gradient", torch.cat(self._accumulated_ids))
            optimizer.zero_grad()
        if self._skipped and not any(g.any() for g in gradients):
            optimizer.zero_grad()  # because momentum and weight decay would change the weights
        self._skipped = False
        self._accumulated_ids.clear()

    def _handle_nonfinite(self, what: str, ids_b: Tensor) -> None:
        ids = ids_b.tolist()
        problem = f"No finite {what} at step {self.global_step} for the sequences {ids}"
        with suppress(OSError), (Path(self.trainer.default_root_dir) / NONFINITE).open("a") as file:
            file.write(json.dumps({"step": self.global_step, "what": what, "ids": ids}) + "\n")
        if self.on_nonfinite == "stop":
            raise UsageError(f"{problem}: lower the rates, remove them, or set model.on_nonfinite to skip.")
        warnings.warn(f"{problem}: the batch is skipped.", stacklevel=2)

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """Ends training at ``max_flops``, after all batches of a slow step."""
        trainer: Any = self.trainer
        whole = (index + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self.max_flops and whole and self.progress >= 1:
            trainer.should_stop = True

    def validation_step(self, batch: Batch, index: int) -> None:
        """Logs the KL and, if prior and guide have one, the bound: one draw from the final q."""
        if torch.is_inference_mode_enabled():
            raise UsageError("Validation fits q and needs gradients: build the Trainer with `inference_mode=False`.")
        keys = RowKeys.of_batch(batch.observed, self.seed)
        with fix_global_draws(self.model, self.seed):
            state, _ = infer_local(self.model, self.guide, batch, self.evaluation, keys=keys)
            draws = Draws(noise=RowNoise(keys.fold_in("validation")))
            terms = elbo_terms(self.model, self.guide, batch, state.parameters, draws)
        tokens = int(batch.mask_BT.sum())
        figures: dict[str, Any] = {"val/kl": terms.kl_B.sum() / tokens, "step": float(self.global_step - 1)}
        if missing_bound(self.model, self.guide) is None:
            figures["val/bound"] = -terms.elbo_B.sum() / tokens
        self.log_dict(figures, batch_size=tokens, sync_dist=True)
