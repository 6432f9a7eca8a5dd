"""A Latent-Thought Language Model as a Pyro program: thoughts from the prior, tokens from the decoder."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import cast

import pyro
from jaxtyping import Float, Int
from pyro.nn import PyroModule
from torch import Tensor

from ltm_pyro.contracts import TOKENS, Batch, Prior, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.check_prior import check_prior
from ltm_pyro.inference.covariates import Covariates, documents_of
from ltm_pyro.inference.enumeration import responsibilities, sum_out
from ltm_pyro.inference.param_store import OwnParams, no_param_store
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.denoiser import Denoiser
from ltm_pyro.models.long_documents import PiecewiseDecoder
from ltm_pyro.nn.cross_entropy import LateGradient
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.nn.token_categorical import TokenCategorical


class LatentThoughtModel(PyroModule):
    r"""Thoughts from a prior, tokens from a decoder that attends to them (arXiv 2502.01567, section 2).

    .. math:: p(x, z) = p(z) \prod_t p_\beta(x_t \mid z, x_{t-W \ldots t-1})

    A `pyro.param` of the prior becomes a parameter of the prior (`ltm_pyro.inference.param_store.adopt_params`).

    In the paper's notation β is ``decoder.parameters()`` and z is what ``prior`` returns.

    Args:
        prior: a PyroModule whose forward samples the thoughts ``z_BLKD`` of the sequences of the surrounding plate.
        decoder: the network of p_β; ``decoder.thought_shape`` is (L, K, D).

    Raises:
        UsageError: the sites or the thoughts of the prior do not have the shapes that `check_prior` requires, or the
            decoder is not causal.
    """

    def __init__(self, prior: Prior, decoder: Decoder | Denoiser) -> None:
        super().__init__()
        if isinstance(decoder, Denoiser):
            raise UsageError(
                "A denoiser sees what it has to predict, unless it is masked: set `model.joint` to "
                "ltm_pyro.models.MaskedDiffusionModel."
            )
        self.prior = prior
        self.decoder = decoder
        self.covariates = Covariates(prior)
        self.enumerated: list[dict[str, Tensor]] = []  # every combination of values of the prior's discrete sites
        check_prior(self, adopt=True)

    def sample_prior(self, size: int, covariates_BC: Float[Tensor, "B C"] | None = None) -> Float[Tensor, "... L K D"]:
        """Samples the thoughts of ``size`` sequences, of which nothing is known if ``covariates_BC`` is None."""
        like = next(self.decoder.parameters())
        arguments = self.covariates.arguments(covariates_BC, size, like.device)
        with sequence_plate(size), full_precision(like):
            return self._thoughts(arguments)

    def _thoughts(self, arguments: dict[str, Tensor]) -> Float[Tensor, "... L K D"]:
        """z from the prior, whose discrete sites are summed out, and whose parameters are its own."""
        with OwnParams(self.prior):
            if self.enumerated:
                device = next(cast(Decoder, self._modules["decoder"]).parameters()).device
                values = [{name: x.to(device) for name, x in each.items()} for each in self.enumerated]
                return sum_out(partial(self.prior, **arguments), values, pyro.sample)
            return self.prior(**arguments)

    def responsibilities(
        self, sites: Mapping[str, Tensor], covariates_BC: Float[Tensor, "B C"] | None = None
    ) -> dict[str, Float[Tensor, "... M"]]:
        """p(value | z) of every discrete site of the prior, by name, given the values of its continuous sites."""
        size = next(iter(sites.values())).shape[0]
        arguments = self.covariates.arguments(covariates_BC, size, next(self.decoder.parameters()).device)
        with sequence_plate(size), no_param_store(self), OwnParams(self.prior):
            return responsibilities(partial(self.prior, **arguments), self.enumerated, sites)

    def covariates_of(self, batch: Batch) -> Float[Tensor, "B C"] | None:
        """The numbers of the labels that the prior asks for; None if it asks for none."""
        if not self.covariates.names or batch.covariates_BC is not None:
            return batch.covariates_BC
        return self.covariates.encode(documents_of(batch)).to(batch.inputs_BT.device)

    def with_long_documents(self, context: int | None = None) -> "LatentThoughtModel":
        """The same model, weights shared, for documents of any length under one z each (`PiecewiseDecoder`).

        Args:
            context: tokens that are read again before each piece; by default the decoder's whole reach.
        """
        long = copy.copy(self)
        long._modules = {**self._modules, "decoder": PiecewiseDecoder(self.decoder, context)}
        return long

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the decoder's stem, the part of the network that does not depend on z.

        Raises `UsageError` for tokens beyond the vocabulary, a batch that is too long, or one on another device.
        """
        batch.check_tokens(self.decoder.vocabulary)
        return batch._replace(stem_BTD=self.decoder.stem(batch.inputs_BT), covariates_BC=self.covariates_of(batch))

    def forward(self, batch: Batch, use_thoughts: bool = True) -> Float[Tensor, "... L K D"]:
        """Samples z, observes the tokens, and returns z.

        If ``batch.targets_BT`` is None, the tokens are sampled, each given ``batch.inputs_BT`` up to its position. If
        ``use_thoughts`` is False, the tokens do not depend on z.
        """
        arguments = self.covariates.arguments(self.covariates_of(batch), batch.size, batch.inputs_BT.device)
        with sequence_plate(batch.size):
            with full_precision(batch.inputs_BT):
                z_BLKD = self._thoughts(arguments)
            tokens = self.observation(z_BLKD if use_thoughts else None, batch)
            pyro.sample(TOKENS, tokens, obs=self.observed(batch))
        return z_BLKD

    def observation(self, z_BLKD: Float[Tensor, "... L K D"] | None, batch: Batch) -> TokenCategorical:
        """p(x | z) as a distribution; padding is masked out. If z is None, the decoder skips its cross-attention."""
        decoder = cast(Decoder, self._modules["decoder"])
        if decoder.embedding.weight.requires_grad:  # else skip PyroModule.__getattr__, which registers all parameters
            decoder = self.decoder  # on every access: too slow for the fast steps, which train none of them
        stem_BTD = batch.stem_BTD
        if stem_BTD is None:  # not in the fast steps, which have a batch that `prepare` has checked
            batch.check_tokens(decoder.vocabulary)
            stem_BTD = decoder.stem(batch.inputs_BT)
        embedding_VD, lead = decoder.embedding.weight, stem_BTD.shape[:1] if z_BLKD is None else z_BLKD.shape[:-3]
        late = LateGradient.of(embedding_VD, (*lead, stem_BTD.shape[1]))
        return TokenCategorical(decoder(stem_BTD, z_BLKD), embedding_VD, batch.mask_BT, late)

    def observed(self, batch: Batch) -> Int[Tensor, "B T"] | None:
        """x, the tokens."""
        return batch.targets_BT
