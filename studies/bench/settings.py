"""What is measured: sizes, and how many fast steps."""

from typing import NamedTuple


class Setting(NamedTuple):
    """A model and its batch; the letters are those of `ltm_pyro.contracts`."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    window: int
    thoughts: int
    steps: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length


SETTINGS = {  # on a CPU
    "tiny": Setting(128, 3, 4, 1024, 64, 64, 4, 16, 16),
    "wide": Setting(256, 3, 4, 8192, 256, 64, 8, 16, 4),
    "ltm-small": Setting(512, 3, 8, 50_257, 512, 256, 8, 4, 2),
}
CUDA_SETTINGS = {  # the published sizes; the batch is halved until it fits
    "cuda-small": Setting(512, 3, 8, 50_257, 1024, 256, 8, 16, 64),
    "cuda-large": Setting(512, 12, 8, 50_257, 1024, 256, 8, 64, 16),
    "cuda-graph": Setting(512, 3, 8, 50_257, 1024, 256, 8, 16, 8),  # so small that a step is mostly launches
}
SWEEPS = {  # one number changed at a time, from this base
    "length": (128, 256, 512, 1024),
    "window": (32, 64, 128, 256),
    "steps": (2, 4, 8, 16),
    "layers": (1, 2, 4),
    "vocabulary": (1024, 4096, 16_384),
}
SWEEP_BASE = Setting(128, 2, 4, 4096, 256, 64, 4, 4, 4)
