r"""Rethinking: a text is written, its thoughts are inferred from prompt and text, it is written again, and so on.

What the loop samples from is its *target*; y is the text after the prompt x.

- ``ancestral``: z ~ q(z | x), y ~ p(y | z, x), each time anew. The control: nothing is rethought.
- ``gibbs``: y ~ p(y | z, x), and a move of z that leaves p(z | x, y) as it is (Metropolis, independent proposals from
  q(z | x, y), fitted from a fixed start and with fixed noise: a function of x and y alone). The loop leaves
  p(z, y | x) as it is, so that y comes from p(y | x). It repairs a poor q(z | x), and cannot beat exact ancestral
  sampling.
- ``rethink``: fast steps on q(z | x, y) from where it stands, z ~ q, y ~ p(y | z, x), as in arXiv 2602.06584. It is the
  Gibbs loop with q in the place of p(z | x, y), and no correction: near p(y | x) where q is near the posterior, and
  wrong by as much as q is. With likeliest tokens, or at a low temperature, it has another law.

Where training scored the text alone (``data.score: completion``), the model says nothing of the prompt, and p(y | x) is
∫ p(z) p(y | z, x) dz: that is what ``gibbs`` samples from, while q of the other targets has seen the prompt, as in
training. Global latent variables are drawn once for each seed.

Shapes: B rows (chains of all prompts), C chains of a prompt, N iterations, T tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import Batch
from ltm_pyro.data.encode import Tokens, batch_of_rows, encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.elbo import Draws, elbo_terms, latent_sites, log_weights, missing_bound
from ltm_pyro.inference.global_latents import fix_draws_by_keys
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.runs.run import Run
from ltm_pyro.text.denoising import fills_gaps
from ltm_pyro.text.generation import check_prompts, decode, prompt_keys, write
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.thoughts import with_labels_asked_for
from ltm_pyro.utils.threads import one_at_a_time

Target = Literal["ancestral", "gibbs", "rethink"]
Keep = Literal["last", "elbo", "likelihood", "majority"]


@dataclass(frozen=True, kw_only=True)
class Rethinking:
    """How often a text is written again, what the loop samples from, and which of its drafts is kept.

    Args:
        iterations: N, after the first draft.
        target: ``ancestral``, ``gibbs`` or ``rethink``; see this module.
        chains: C, independent loops for each prompt.
        keep: which draft is returned: the ``last`` one (of the first chain), that with the highest ``elbo`` of prompt
            and draft, that with the highest ``likelihood`` log p(y | z, x), or what most chains end with
            (``majority``).
        patience: a prompt is finished once no chain's draft has changed for so many iterations; None for never. Not for
            ``gibbs``: a loop that ends at a text that stays favours such texts.
        inference: settings of local inference; those of the run's evaluation when not given.
        labels: of the documents that are written, for a prior that asks for them.
    """

    iterations: int = 10
    target: Target = "rethink"
    chains: int = 1
    keep: Keep = "last"
    patience: int | None = None
    inference: LocalInference | None = None
    labels: dict[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in {"target": Target, "keep": Keep}.items():
            if getattr(self, name) not in choices.__args__:  # type: ignore[attr-defined]
                known = ", ".join(choices.__args__)  # type: ignore[attr-defined]
                raise UsageError(f"There is no {name} {getattr(self, name)!r}: choose from {known}.")
        if self.iterations < 0 or self.chains < 1 or (self.patience is not None and self.patience < 1):
            raise UsageError(
                f"Rethinking needs iterations ≥ 0, chains ≥ 1 and patience ≥ 1, got {self.iterations}, {self.chains} "
                f"and {self.patience}."
            )
        if self.target == "gibbs" and self.patience:
            raise UsageError("The target gibbs has no patience: to end where a draft stays would favour such drafts.")


class Rethought(NamedTuple):
    """All drafts of one prompt: by iteration (the first is the one before any rethinking) and chain.

    ``elbo`` and ``kl`` are those of prompt and draft under a q fitted to them, at one draw (NaN where there is no
    bound); ``log_likelihood`` is log p(y | z, x) at the ``z`` that the draft was written from; all in nats.
    ``accepted`` says whether z has moved before a draft (always, but for ``gibbs``). A difference of two ELBOs bounds
    nothing.
    """

    prompt: str
    text: str
    drafts: list[list[str]]
    elbo_NC: Float[np.ndarray, "N C"]
    kl_NC: Float[np.ndarray, "N C"]
    log_likelihood_NC: Float[np.ndarray, "N C"]
    accepted_NC: Bool[np.ndarray, "N C"]
    z_NCLKD: Float[np.ndarray, "N C L K D"]


class Draft(NamedTuple):
    """One iteration of all rows: the texts, and what is recorded of them."""

    texts: list[str]
    elbo_B: Tensor
    kl_B: Tensor
    log_likelihood_B: Tensor
    accepted_B: Tensor
    z_BLKD: Tensor


@one_at_a_time
def rethink(
    run: Run,
    prompts: str | Sequence[str],
    rethinking: Rethinking | None = None,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda iteration: None,
) -> list[Rethought]:
    """Writes a text after each prompt, and writes it again with thoughts that have seen it.

    A result depends on its prompt and the seed, not on the other prompts. After Ctrl-C the drafts so far are returned,
    of the prompts that have some.

    Args:
        batch_size: about how many chains run together; it does not change them.
        progress: called after each iteration of a batch with its number, from 0 for the first drafts.

    Raises:
        UsageError: the run cannot do it: no thoughts, a q that sees prompts alone, no density of q for ``gibbs``, or
            filters of tokens, under which y does not come from p(y | z, x).
    """
    rethinking, sampling = rethinking or Rethinking(), sampling or Sampling()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(run, rethinking, sampling)
    tokens = [encode_prompt(run.tokenizer, prompt) for prompt in prompts]
    check_prompts(run, tokens)
    found: list[Rethought] = []
    size = max(1, batch_size // rethinking.chains)
    for first in range(0, len(prompts), size):
        rows = [row for row in tokens[first : first + size] for _ in range(rethinking.chains)]
        drafts: list[Draft] = []
        try:
            for draft in _drafts(run, rows, rethinking, sampling, seed):
                drafts.append(draft)
                progress(len(drafts) - 1)
                if len(drafts) > rethinking.iterations or _all_settled(drafts, rethinking):
                    break
        except KeyboardInterrupt:
            if not drafts and not found:
                raise
        found += _kept(prompts[first : first + size], drafts, rethinking)
        if len(drafts) <= rethinking.iterations and not _all_settled(drafts, rethinking):
            break  # interrupted
    return found


def _kept(prompts: Sequence[str], drafts: Sequence[Draft], rethinking: Rethinking) -> list[Rethought]:
    """All drafts of each prompt, up to where it was finished, and the one that is kept."""
    found = []
    for number, prompt in enumerate(prompts if drafts else ()):
        place = slice(number * rethinking.chains, (number + 1) * rethinking.chains)
        texts = [draft.texts[place] for draft in drafts]
        settled = _settled_at(texts, rethinking.patience)
        last = len(drafts) - 1 if settled is None else settled
        columns = (torch.stack([getattr(x, name)[place] for x in drafts[: last + 1]]) for name in Draft._fields[1:])
        elbo_NC, kl_NC, log_likelihood_NC, *others = (x.numpy() for x in columns)
        text = texts[last][0]
        if rethinking.keep == "majority":
            text = Counter(texts[last]).most_common(1)[0][0]
        elif rethinking.keep != "last":
            by = elbo_NC if rethinking.keep == "elbo" else log_likelihood_NC
            iteration, chain = np.unravel_index(np.where(np.isnan(by), -np.inf, by).argmax(), by.shape)
            text = texts[iteration][chain]
        found.append(Rethought(prompt, text, texts[: last + 1], elbo_NC, kl_NC, log_likelihood_NC, *others))
    return found


def _check(run: Run, rethinking: Rethinking, sampling: Sampling) -> None:
    if fills_gaps(run) or 0 in getattr(run.model.decoder, "thought_shape", (0,)):
        raise UsageError("The run has no thoughts, so there is nothing to rethink: use a Latent-Thought model.")
    if run.observe == "prompt" and rethinking.target != "ancestral":
        raise UsageError(
            "q of this run sees prompts alone (`data.observe: prompt`), so that no draft changes its thoughts: choose "
            "the target ancestral, or train with `data.observe: all`."
        )
    if sampling.num_return_sequences > 1:
        raise UsageError(f"num_return_sequences is {sampling.num_return_sequences}: ask for as many chains instead.")
    plain = Sampling(max_new_tokens=sampling.max_new_tokens, stop_strings=sampling.stop_strings)
    if rethinking.target == "gibbs" and sampling != plain:
        raise UsageError(
            "The target gibbs needs y from p(y | z, x): leave greedy, temperature, filters and penalty out."
        )
    if rethinking.target == "gibbs" and not run.guide.has_density:  # an unknown constant of the prior cancels
        raise UsageError(f"The target gibbs needs the density of q, and {type(run.guide).__name__} has none.")
    if rethinking.keep == "elbo" and (missing := missing_bound(run.model, run.guide)):
        raise UsageError(f"There is no ELBO to keep a draft by, because {missing}: choose another draft to keep.")


def _drafts(
    run: Run, prompts: list[list[int]], rethinking: Rethinking, sampling: Sampling, seed: int
) -> Iterator[Draft]:
    """The first drafts, and one iteration after the other, without end."""
    model, guide, inference = run.model, run.guide, rethinking.inference or run.inference
    keys = prompt_keys(run, prompts, seed, [*range(rethinking.chains)] * (len(prompts) // rethinking.chains))
    has_bound = missing_bound(model, guide) is None
    given = _batch(run, prompts, prompts, rethinking)
    of_prompt, _ = infer_local(model, guide, given, inference, keys=keys)
    state, sites = of_prompt, _sample(run, given, of_prompt, keys.fold_in("q", 0))
    accepted_B = torch.ones(len(prompts), dtype=torch.bool, device=run.device)
    for iteration in count():
        z_BLKD = _thoughts(run, given, sites, keys)
        written = write(run, prompts, z_BLKD, keys.fold_in("draft", iteration), sampling)
        texts = decode(run, written)
        rows = [
            [*prompt, *new, *_end(run, prompt, new, text, sampling)]
            for prompt, new, text in zip(prompts, written, texts, strict=True)
        ]
        batch = _batch(run, rows, prompts, rethinking)
        if rethinking.target == "rethink":
            state, _ = infer_local(model, guide, batch, inference, state, keys=keys.fold_in(iteration))
        else:  # a function of prompt and text alone, as a proposal of Metropolis has to be
            batch = batch._replace(observed_BT=None) if rethinking.target == "gibbs" else batch
            state, _ = infer_local(model, guide, batch, inference, keys=RowKeys.of_batch(batch, seed))
        with torch.no_grad(), no_param_store(model), fix_draws_by_keys(model, keys):
            noise = RowNoise(keys.fold_in("elbo", iteration))
            terms = elbo_terms(model, guide, batch, state.parameters, Draws(kl="sampled", noise=noise))
            text = batch._replace(mask_BT=_text_mask(batch, prompts))
            log_likelihood_B = model.observation(z_BLKD, text).log_prob(text.targets_BT)
        figures = [x if has_bound else torch.full_like(x, torch.nan) for x in (terms.elbo_B, terms.kl_B)]
        yield Draft(texts, *(x.cpu() for x in (*figures, log_likelihood_B, accepted_B, z_BLKD)))
        own = keys.fold_in("q", iteration + 1)
        if rethinking.target == "ancestral":
            sites = _sample(run, given, of_prompt, own)
        elif rethinking.target == "rethink":
            sites = _sample(run, batch, state, own)
        else:
            proposed = _sample(run, batch, state, own)
            new_B, old_B = (_log_weight(run, batch, state, x, keys) for x in (proposed, sites))
            accepted_B = keys.fold_in("accept", iteration).uniform(1)[:, 0].log() < new_B - old_B
            sites = {
                name: torch.where(accepted_B.view(-1, *[1] * (x.dim() - 1)), proposed[name], x)
                for name, x in sites.items()
            }


def _end(run: Run, prompt: Tokens, new: Tokens, text: str, sampling: Sampling) -> list[int]:
    """`END_OF_TEXT` behind a text that has ended by itself; nothing behind one that was cut."""
    cut = len(new) >= sampling.max_new_tokens or len(prompt) + len(new) >= run.length
    cut = cut or any(stop in text for stop in sampling.stop_strings or ())
    return [] if cut else [run.start_token]


def _batch(run: Run, rows: Sequence[Tokens], prompts: Sequence[Tokens], rethinking: Rethinking) -> Batch:
    """Rows of prompt and text, prepared; q sees both, and where training scored the text alone, so does this."""
    batch = batch_of_rows(rows, run.start_token, run.length, run.device)
    batch = with_labels_asked_for(run, batch, rethinking.labels)
    if run.score == "completion":
        batch = batch._replace(mask_BT=_text_mask(batch, prompts), observed_BT=batch.mask_BT)
    with torch.no_grad():
        return run.model.prepare(batch)


def _text_mask(batch: Batch, prompts: Sequence[Tokens]) -> Bool[Tensor, "B T"]:
    """Which tokens belong to the text behind the prompt."""
    given_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=batch.mask_BT.device)
    return batch.mask_BT & (torch.arange(batch.mask_BT.shape[1], device=batch.mask_BT.device) >= given_B1)


def _sample(run: Run, batch: Batch, state: LocalState, keys: RowKeys) -> dict[str, Tensor]:
    """A draw of every latent site from q, or from the prior where q has seen no token."""
    with (
        torch.no_grad(),
        no_param_store(run.model),
        full_precision(batch.inputs_BT),
        fix_draws_by_keys(run.model, keys),
    ):
        with RowNoise(keys):
            q: Any = poutine.trace(run.guide).get_trace(batch, state.parameters)
        with RowNoise(keys.fold_in("prior")):
            p: Any = poutine.trace(run.model.sample_prior).get_trace(*prior_arguments(run.model, batch))
    blank_B = batch.observed.tokens_B == 0
    return {
        name: torch.where(blank_B.view(-1, *[1] * (site["value"].dim() - 1)), p.nodes[name]["value"], site["value"])
        for name, site in latent_sites(q).items()
    }


def _at(sites: dict[str, Tensor], program: Callable[..., Any]) -> Callable[..., Any]:
    """A program whose latent sites have the given values."""
    trace = poutine.Trace()
    for name, value in sites.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    replayed: Callable[..., Any] = poutine.replay(program, trace=trace)
    return replayed


def _thoughts(run: Run, batch: Batch, sites: dict[str, Tensor], keys: RowKeys) -> Float[Tensor, "B L K D"]:
    """z, which is a function of the latent sites."""
    with torch.no_grad(), no_param_store(run.model), fix_draws_by_keys(run.model, keys):
        z_BLKD: Tensor = _at(sites, run.model.sample_prior)(*prior_arguments(run.model, batch))
    return z_BLKD


def _log_weight(
    run: Run, batch: Batch, state: LocalState, sites: dict[str, Tensor], keys: RowKeys
) -> Float[Tensor, " B"]:
    """log p(x, y, z) − log q(z | x, y) in nats."""
    with torch.no_grad(), fix_draws_by_keys(run.model, keys):
        return log_weights(run.model, _at(sites, run.guide), batch, state.parameters)


def _settled_at(drafts: Sequence[Sequence[str]], patience: int | None) -> int | None:
    """The first iteration at which no chain's draft has changed for ``patience`` iterations; None if there is none."""
    if patience is None:
        return None
    ends = range(patience, len(drafts))
    return next((end for end in ends if all(x == drafts[end] for x in drafts[end - patience : end])), None)


def _all_settled(drafts: Sequence[Draft], rethinking: Rethinking) -> bool:
    """Whether every prompt of a batch is finished."""
    chains = rethinking.chains
    firsts = range(0, len(drafts[0].texts) if drafts else 0, chains)
    texts = [[draft.texts[first : first + chains] for draft in drafts] for first in firsts]
    return all(_settled_at(own, rethinking.patience) is not None for own in texts)
