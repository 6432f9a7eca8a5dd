"""Masked diffusion against enumeration: its bound, its law of any order, and what N denoising steps draw."""

from itertools import combinations, permutations, product
from math import comb

import pytest
import torch
from pyro import poutine
from scipy.stats import chisquare

from ltm_pyro.contracts import make_batch
from ltm_pyro.data.tokenizer import number_tokenizer
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import Masking, MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.estimators import ESTIMATORS, evaluate
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.masking import ORDER, SHARE, StratifiedUniform, choose_masked
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, Denoiser, GaussianPrior, LatentThoughtModel, MaskedDiffusionModel
from ltm_pyro.runs.run import Run
from ltm_pyro.text.denoising import denoise, draw_lengths
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.training.check_model import check_model

V, T = 3, 4
TEXTS = torch.tensor([*product(range(V), repeat=T)])


class Table(Denoiser):
    """The true conditionals of a law of texts, p(x_i | visible), as a network."""

    def __init__(self, p_X):
        super().__init__(V, layers=1, width=4, heads=1, length=T)
        self.p_X = p_X
        self.embedding.weight.data = torch.eye(V, 4)

    def stem(self, tokens_BT, masked_BT=None):
        return torch.where(masked_BT, -1, tokens_BT)[..., None].double()

    def forward(self, stem_BTD, z_BLKD, visible_BT):
        seen_BT = stem_BTD[..., 0].long()
        fits_BX = ((seen_BT[:, None] == TEXTS) | (seen_BT[:, None] < 0)).all(-1)
        p_BTV = (fits_BX * self.p_X).double() @ torch.nn.functional.one_hot(TEXTS, V).double().flatten(1)
        log_BTV = p_BTV.unflatten(1, (T, V)).clamp(min=1e-300).log()  # an infinite logit times 0 is none
        return torch.nn.functional.pad(log_BTV, (0, 1)) + 0 * self.mask_D.sum()


@pytest.fixture
def law():
    return torch.softmax(1.5 * torch.randn(len(TEXTS)), 0)


def model_of(decoder):
    """A model whose texts all have T tokens."""
    model = MaskedDiffusionModel(GaussianPrior(decoder.thought_shape), decoder)
    with torch.no_grad():
        model.length_logits_T[:-1] = -1e9
    return model


def tiny(vocabulary=V, length=T, **changed):
    model = model_of(Denoiser(vocabulary, **{"layers": 2, "width": 8, "heads": 2, "length": length} | changed))
    with torch.no_grad():
        for x in model.decoder.parameters():
            x += 0.5 * torch.randn_like(x)
    return model


def run_of(model):
    """A run of sequences of numbers, the largest of which is the end of text."""
    tokenizer = number_tokenizer(model.decoder.vocabulary - 1)
    return Run(model, Masking(model), tokenizer, LocalInference(), "nowhere", model.decoder.length)


def log_likelihoods(model, batch, masked):
    """log p at the sites given that a set of tokens is masked, of all sequences."""
    share = torch.full((batch.size,), (len(masked) - 0.5) / int(batch.mask_BT[0].sum()))
    order = torch.tensor([0.0 if i in masked else 1.0 for i in range(batch.targets_BT.shape[1])])
    given = {SHARE: share, ORDER: order.expand(batch.size, -1)}
    trace = poutine.trace(poutine.condition(model, given)).get_trace(batch)
    return sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in ("length", "tokens"))


def exact_bound(model, batch):
    """The bound with all m and all subsets of the scored tokens summed."""
    scored = batch.mask_BT[0].nonzero()[:, 0].tolist()
    total = 0.0
    for m in range(1, len(scored) + 1):
        for masked in combinations(scored, m):
            total = total - log_likelihoods(model, batch, set(masked)) / len(scored) / comb(len(scored), m)
    return total


def texts(rows=TEXTS):
    return make_batch(rows, torch.full((len(rows),), rows.shape[1]), start_token=0)


def conditional(model, rows_BT, visible):
    """log p(x_i | visible) of every token and symbol: (B, T, V)."""
    masked = torch.tensor([i not in visible for i in range(rows_BT.shape[1])]).expand(rows_BT.shape)
    hidden = model.decoder(model.decoder.stem(rows_BT, masked), None, torch.ones_like(masked))
    return model.decoder.logits(hidden).log_softmax(-1)


def of_order(model, order):
    """−log p(x) of all texts, written in one order."""
    nats = torch.zeros(len(TEXTS))
    for place, i in enumerate(order):
        log_p = conditional(model, TEXTS, set(order[:place]))[:, i]
        nats = nats - log_p.gather(-1, TEXTS[:, i, None])[:, 0]
    return nats


@torch.no_grad()
def test_with_the_true_conditionals_the_bound_is_exact_for_every_text(law):
    model = model_of(Table(law))
    torch.testing.assert_close(exact_bound(model, texts()), -law.log(), rtol=0, atol=1e-9)
    prompt = texts()._replace(mask_BT=torch.tensor([False, True, False, True]).expand(len(TEXTS), -1))
    same = (TEXTS[:, None, ::2] == TEXTS[None, :, ::2]).all(-1)
    torch.testing.assert_close(exact_bound(model, prompt), -(law / (same * law).sum(-1)).log(), rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_bound_is_the_average_over_orders_and_never_below_the_law_of_any_order():
    model = tiny()
    orders = [of_order(model, order) for order in permutations(range(T))]
    nats_OX, bound = torch.stack(orders), exact_bound(model, texts())
    torch.testing.assert_close(bound, nats_OX.mean(0))
    any_order = -(nats_OX.neg().logsumexp(0) - torch.tensor(float(len(orders))).log())
    torch.testing.assert_close(any_order.neg().exp().sum(), torch.tensor(1.0))
    assert (bound >= any_order - 1e-12).all()
    assert (bound - any_order).max() > 0.01


@torch.no_grad()
def test_draws_of_the_bound_are_unbiased_for_texts_of_any_length_and_padding_changes_nothing():
    model = tiny(vocabulary=5, length=6)
    torch.nn.init.normal_(model.length_logits_T)
    rows = torch.randint(0, 5, (3, 6))
    lengths, found = [6, 4, 1], {}
    for pad in (6, 4):
        batch = make_batch(rows[:, :pad], torch.tensor(lengths).clamp(max=pad), start_token=0)
        guide = Masking(model)
        state, _ = infer_local(model, guide, batch, LocalInference())
        noise = RowNoise(RowKeys.of_batch(batch, 3))
        found[pad] = elbo_terms(model, guide, batch, state.parameters, Draws(8000, noise=noise))
    assert (found[6].kl_B == 0).all()
    draws = found[6].log_likelihood_B
    for row, length in zip(rows, lengths, strict=True):
        exact = exact_bound(model, make_batch(row[None, :length], torch.tensor([length]), start_token=0))
        mine = draws[:, lengths.index(length)]
        sets = mine.view(-1, StratifiedUniform.STRATA).mean(1)
        assert -mine.mean() == pytest.approx(exact.item(), abs=4 * sets.std().item() / len(sets) ** 0.5 + 1e-12)
    torch.testing.assert_close(found[4].log_likelihood_B[:, 1:], draws[:, 1:])


def test_the_number_of_masked_tokens_is_stratified_over_a_batch_and_over_draws():
    share = StratifiedUniform(torch.tensor(0.0), torch.tensor(1.0))
    together = share.expand([10]).sample()
    assert sorted((10 * together).long().tolist()) == [*range(10)]
    masked, weight = choose_masked(together, torch.rand(10, 10), torch.ones(10, 10, dtype=torch.bool))
    assert sorted(masked.sum(-1).tolist()) == [*range(1, 11)]
    torch.testing.assert_close(weight, 10.0 / masked.sum(-1))
    keys = RowKeys(torch.tensor([5, 9]), 0)
    drawn = RowNoise(keys).sample(share.expand([16, 2]), "share")
    for first in (0, 8):
        assert sorted((8 * drawn[first : first + 8, 0]).long().tolist()) == [*range(8)]
    torch.testing.assert_close(RowNoise(keys, first=8).sample(share.expand([8, 2]), "share"), drawn[8:])
    torch.testing.assert_close(
        RowNoise(keys.select(torch.tensor([1]))).sample(share.expand([16, 1]), "share"), drawn[:, 1:]
    )
    assert len({*(8 * drawn % 1).flatten().mul(1e6).round().tolist()}) == 4, "sets and rows have offsets of their own"


def partitions(size, steps):
    """All ways to divide positions among steps of the sizes that `denoise` takes, as lists of sets."""
    sizes = [sum(rank * steps // size == step for rank in range(size)) for step in range(steps)]
    found = {
        tuple(frozenset(order[sum(sizes[:j]) : sum(sizes[: j + 1])]) for j in range(steps))
        for order in permutations(range(size))
    }
    return sorted(found, key=str)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, None])
@torch.no_grad()
def test_n_steps_draw_from_the_exact_law_of_n_steps(steps):
    model, draws = tiny(), 20_000
    ways = partitions(T, steps or T)
    exact = torch.zeros(len(TEXTS))
    for way in ways:
        log_p, before = torch.zeros(len(TEXTS)), set()
        for now in way:
            found = conditional(model, TEXTS, before).gather(-1, TEXTS[..., None])[..., 0]
            log_p, before = log_p + found[:, [*now]].sum(-1), before | now
        exact += log_p.exp() / len(ways)
    run = run_of(model)
    keys = RowKeys(torch.zeros(draws, dtype=torch.long), 0).fold_in(torch.arange(draws))
    drawn = torch.tensor(denoise(run, [[None] * T] * draws, keys, Sampling(), steps))
    counts = torch.bincount((drawn * V ** torch.arange(T - 1, -1, -1)).sum(-1), minlength=len(TEXTS))
    assert chisquare(counts.numpy(), (draws * exact).numpy(), sum_check=False).pvalue > 0.001
    gaps = denoise(run, [[0, None, 2, None]] * 50, RowKeys(keys.key_B[:50], 0), Sampling(), steps)
    assert {(row[0], row[2]) for row in gaps} == {(0, 2)}


@torch.no_grad()
def test_a_text_depends_on_its_key_alone_and_lengths_follow_their_law():
    model = tiny(length=8)
    torch.nn.init.normal_(model.length_logits_T)
    run = run_of(model)
    keys = RowKeys(torch.zeros(6000, dtype=torch.long), 0).fold_in(torch.arange(6000))
    few = RowKeys(keys.key_B[:2], 0)
    both = denoise(run, [[1, None, None], [None] * 8], few, Sampling(), lengths=[5, 8])
    assert denoise(run, [[1, None, None]], few.select(torch.tensor([0])), Sampling(), lengths=[5]) == both[:1]
    lengths = torch.tensor(draw_lengths(run, [[1, 1, 1]] * 6000, keys))
    law = model.length_logits_T.clone()
    law[:3] = -torch.inf
    counts = torch.bincount(lengths, minlength=9)[4:]
    assert counts.sum() == 6000
    assert chisquare(counts.numpy(), (6000 * law.softmax(0)[3:]).numpy(), sum_check=False).pvalue > 0.001


def test_only_the_bound_is_defined_and_its_monte_carlo_error_is_known():
    model = tiny(vocabulary=7, length=6)
    guide, batch = Masking(model), make_batch(torch.randint(1, 7, (4, 6)), torch.tensor([6, 5, 4, 6]), start_token=0)
    found = evaluate(model, guide, [batch], LocalInference(), samples=64)
    assert {*found.estimates} == {"bound"}
    assert {*found.unavailable} == {"iwae", "prior", "reused_noise"}
    score = found.estimates["bound"]
    assert score.is_bound
    errors = [
        evaluate(model, guide, [batch], LocalInference(), ["bound"], 64, seed).estimates["bound"] for seed in range(40)
    ]
    spread = torch.tensor([x.nats_per_token for x in errors]).std().item()
    assert score.monte_carlo_stderr == pytest.approx(spread, rel=0.5)
    for name in sorted(ESTIMATORS.keys() - {"bound"}):
        with pytest.raises(UsageError, match=rf"No figure for {name}: masked diffusion has .*; ask for bound"):
            evaluate(model, guide, [batch], LocalInference(), [name])


def test_it_can_be_trained_and_is_refused_in_other_company():
    denoiser = Denoiser(11, layers=2, width=8, heads=2, length=6)
    model = MaskedDiffusionModel(GaussianPrior(denoiser.thought_shape), denoiser)
    check_model(model, Masking(model))
    with pytest.raises(UsageError, match="has no site 'mask_order'"):
        check_model(model, MeanField(model))
    causal = Decoder(11, layers=2, width=8, heads=2, thoughts=0, window=4, length=8)
    with pytest.raises(UsageError, match=r"sees both sides of a gap, and Decoder does not: set `model.decoder`"):
        MaskedDiffusionModel(GaussianPrior(causal.thought_shape), causal)
    with pytest.raises(UsageError, match=r"set `model.joint` to ltm_pyro.models.MaskedDiffusionModel"):
        LatentThoughtModel(GaussianPrior(denoiser.thought_shape), denoiser)
    other = LatentThoughtModel(GaussianPrior(causal.thought_shape), causal)
    with pytest.raises(UsageError, match="samples 'mask_order', which the model does not have"):
        check_model(other, Masking(other))
