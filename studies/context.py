"""The two references of the context recovered: what a model would be if its thoughts could carry nothing, or all.

Both are trained as any recipe is, with these settings changed, and have no latent variable: their figures are exact.
"""

from collections.abc import Mapping
from typing import Any

from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.configure import Values

DECODER = "model.decoder.init_args."


def floor(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of the same network with learned constants in the place of thoughts.

    Constants with rotary positions tell a token where it is, and cross-attention has parameters: a decoder without both
    would be too low a floor.

    Args:
        decoder: the ``init_args`` of the Latent-Thought model's decoder.
    """
    constant = {f"{DECODER}constant_thoughts": decoder["thoughts"], "model.keep_local": None}  # no q to keep
    return {**ar_baseline(), **constant}


def ceiling(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of the floor with full attention: it sees all that thoughts could carry."""
    return {**floor(decoder), f"{DECODER}window": decoder["length"]}
