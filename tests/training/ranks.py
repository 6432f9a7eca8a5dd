"""A training on one or two gloo ranks in which a sequence's noise depends on its id, not on where it is computed.

usage: ranks.py PACK WEIGHTS RANKS BATCH_SIZE [POISONED_ID]
"""

import sys
import warnings

import pytorch_lightning as pl
import torch
from torch.distributions import normal

from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.training import module as lightning_module
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.training.module import LTMModule

pack, weights, ranks, batch_size, *poisoned = sys.argv[1:]
calls, ids = 0, []


def noise(shape, dtype, device):
    """The draw of one fast step: of every sequence its own."""
    global calls
    calls += 1
    mine = ids if len(ids) == shape[0] else range(shape[0])  # or the model is only looked at
    draws = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(1000 * calls + i)) for i in mine]
    bad = torch.tensor([str(i) in poisoned and bool(ids) and module.global_step == 3 for i in mine])
    return torch.stack(draws).where(~bad.view(-1, *[1] * (len(shape) - 1)), torch.nan)


def numbered(model, guide, batch, *rest):
    """`training_loss`, its noise numbered by the step and the ids of the batch."""
    global calls, ids
    calls, ids = 100 * module.global_step, batch.ids_B.tolist()
    return training_loss(model, guide, batch, *rest)


def decoder(vocabulary):
    return Decoder(vocabulary, layers=2, width=16, heads=2, thoughts=2, window=4, length=16)


normal._standard_normal = noise
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
pl.seed_everything(0, verbose=False)
lightning_module.training_loss = numbered
module = LTMModule(
    decoder=decoder,
    prior=GaussianPrior,
    joint=LatentThoughtModel,
    guide=MeanField,
    vocabulary=280,
    inference=LocalInference(steps=2, rate=0.1, slow_gradient="last"),
    on_nonfinite="skip",
)
trainer = pl.Trainer(
    max_steps=20,
    max_epochs=-1,
    accelerator="cpu",
    devices=int(ranks),
    strategy="ddp" if int(ranks) > 1 else "auto",
    gradient_clip_val=1.0,
    limit_val_batches=0,
    use_distributed_sampler=False,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir="/nonexistent",
)
trainer.fit(module, datamodule=PackedData(pack, batch_size=int(batch_size)))
if trainer.is_global_zero:
    torch.save(module.state_dict(), weights)
