"""A trained model with everything needed to score and to write text."""

import hashlib
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn

from ltm_pyro.contracts import Guide, TextModel
from ltm_pyro.data.dataset import Observed, Scored
from ltm_pyro.data.tokenizer import end_of_text
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference


class Run(NamedTuple):
    """A trained model with everything needed to score and to write text."""

    model: TextModel
    guide: Guide
    tokenizer: Tokenizer
    inference: LocalInference  # of evaluation
    data: str  # the packed directory it was trained on
    length: int  # T, the longest sequence
    source: str = ""  # where it was loaded from
    may_read_data: bool = True  # False if `data` is outside the current folder and nobody has asked for it
    score: Scored = "all"  # what training scored of a document with a prompt
    observe: Observed = "all"  # what q was fitted to

    @property
    def start_token(self) -> int:
        """The token behind which every sequence begins."""
        return end_of_text(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model is; batches have to be there too."""
        return next(self.model.parameters()).device

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights of model and guide."""
        found = hashlib.sha256()
        parts = (part for part in (self.model, self.guide) if isinstance(part, nn.Module))
        for name, x in (item for part in parts for item in part.state_dict().items()):
            found.update(name.encode())
            found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @property
    def reach(self) -> int | None:
        """L (W − 1) + 1, the tokens before a token that its prediction sees; others reach it through z alone.

        None for a decoder of one's own that has no ``layers`` or ``window``.
        """
        layers, window = (getattr(getattr(self.model, "decoder", None), name, None) for name in ("layers", "window"))
        return layers * (window - 1) + 1 if isinstance(layers, int) and isinstance(window, int) else None

    def to(self, device: str) -> "Run":
        """This run, its model moved to another device; `UsageError` where this machine has none of the name."""
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"There is no device '{device}' here ({reason}): choose cpu.") from None
        for part in (self.model, self.guide):
            if isinstance(part, nn.Module):
                part.to(device)
        return self
