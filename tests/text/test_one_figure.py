"""A text's figure depends on the text, the model, the settings and the seed: not on batches, order or neighbours."""

import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.analysis.posterior import TEXT
from ltm_pyro.analysis.texts import Text
from ltm_pyro.contracts import Init
from ltm_pyro.data import pack_texts
from ltm_pyro.data.encode import batch_of_rows, encode_document, encode_prompt
from ltm_pyro.evaluation.suites.features import run_extractor
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.estimators import ESTIMATORS, OF_A_BATCH, estimate, evaluate, fit_problem
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference, Stop
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score, score_continuations
from tests.laws import PAIRS, make_guide, make_prior

TEXTS = ["the old", "a long text and short words", "naïve café 😀", "model", "reads a", "writes", "about time, the old"]
CONTINUATIONS = [" model reads", " of", "", " text", " long", " short words", " new"]
EXACT = {"rtol": 0, "atol": 1e-8}
GAUSSIAN = ("MeanField", "LowRank", "FullCovariance", "BlockCovariance")  # which can be drawn in antithetic pairs


@pytest.fixture
def run(tiny_run):
    return tiny_run()


def orders(texts, repeats=2):
    """Random orders of the texts, some of them given twice, with a random size of a batch."""
    draw = random.Random(0)
    for _ in range(repeats):
        places = draw.sample(range(len(texts)), len(texts)) + draw.choices(range(len(texts)), k=3)
        yield draw.sample(places, len(places)), draw.choice([1, 2, 3, 5, 32])


def of_texts(name):
    """The nats of texts under an estimator, in batches of a given size."""

    def figures(run, texts, size):
        return [x.nats for x in score(run, texts, Scoring(estimator=name, samples=5, block=4, batch_size=size))]

    return figures


def of_continuations(name):
    """The nats of every token of continuations."""

    def figures(run, texts, size):
        pairs = [(text, CONTINUATIONS[TEXTS.index(text)] or " x") for text in texts]
        found = score_continuations(run, pairs, Scoring(estimator=name, samples=5, block=2, batch_size=size))
        return [sum(x.nats_U) for x in found]

    return figures


def features(run, texts, size):
    return run_extractor(run, batch_size=size)(texts, 0)


def posteriors(run, texts, size):
    found = draw_posterior(run, texts, DrawOptions(samples=25, replicas=2), seed=3)
    stats, replicas = found.stats, found.group(TEXT)["replica_tokens"].values[None]
    words = [[hash(tuple(row[row >= 0])) % 1000 for row in replicas[0, :, i]] for i in range(len(texts))]
    figures = [stats[name].values for name in ("pareto_k", "elbo", "iwae", "kl")]
    return np.concatenate([np.stack(figures, 1), found.z.values[0, -1].reshape(len(texts), -1), words], axis=1)


def chains(run, texts, size):
    options = DrawOptions(samples=25, method="langevin")
    return draw_posterior(run, texts, options, seed=3).z.values[0, -1].reshape(len(texts), -1)


def texts_written(run, texts, size):
    """Only for texts that are given once: a second time a prompt has another text."""
    sampling = Sampling(max_new_tokens=5)
    found = generate(run, list(dict.fromkeys(texts)), sampling, batch_size=size)
    written = dict(zip(dict.fromkeys(texts), found, strict=True))
    return [hash(written[text]) % 1000 for text in texts]


ALONE = [name for name in ESTIMATORS if name not in OF_A_BATCH]
DOORS = {
    **{f"score {name}": of_texts(name) for name in ALONE},
    **{f"continuations {name}": of_continuations(name) for name in ALONE if name != "ais"},  # of whole texts only
    "features": features,
    "posterior": posteriors,
    "generate": texts_written,
}


@pytest.mark.parametrize("door", [pytest.param(x, marks=[pytest.mark.slow] * (x == "score ais")) for x in DOORS])
def test_a_figure_does_not_depend_on_neighbours_order_or_batch(run, door, monkeypatch):
    alone = np.stack([np.asarray(DOORS[door](run, [text], 1)[0]) for text in TEXTS])
    module = sys.modules["ltm_pyro.analysis.draw_posterior"]
    for places, size in orders(TEXTS):
        monkeypatch.setattr(module, "BATCH", size)
        found = DOORS[door](run, [TEXTS[place] for place in places], size)
        # Hamiltonian paths amplify the rounding of a product that another batch size computes in another order
        np.testing.assert_allclose(
            np.asarray(found), alone[places], **EXACT | {"atol": 1e-6 if "ais" in door else 1e-8}
        )
    assert len({*map(str, alone.round(6))}) == len(TEXTS)


def test_posteriors_are_in_the_order_of_the_texts_and_padded_alike(tiny_run, monkeypatch):
    """Whatever texts were fitted together."""
    run = tiny_run(thoughts=1, thought_width=2)
    module = sys.modules["ltm_pyro.analysis.draw_posterior"]
    monkeypatch.setattr(module, "BATCH", 1)

    run.model.prior = make_prior("HierarchicalPrior")  # of two sites, so that its moments are not known
    run = run._replace(guide=MeanField(run.model))
    texts = [Text(text, f"d{i}", {"n": i} if i % 2 else {}) for i, text in enumerate(TEXTS)]
    found = draw_posterior(run, texts, DrawOptions(samples=25), seed=3)
    labels = found.tree["constant_data"]["n"].values.tolist()  # numbers also where a batch has none of them
    assert labels == pytest.approx([i if i % 2 else math.nan for i in range(len(texts))], nan_ok=True)
    assert found.tree["constant_data"]["document"].values.tolist() == [f"d{i}" for i in range(len(texts))]
    lengths = [len(encode_document(run.tokenizer, text)) for text in TEXTS]
    assert found.tree[TEXT]["text"].values.tolist() == TEXTS
    assert found.tree[TEXT]["text"].coords["sequence"].values.tolist() == [*range(len(TEXTS))]
    tokens = found.tree[TEXT]["tokens"].values
    by_token = found.tree[TEXT]["log_likelihood"].values
    assert tokens.shape[1] == by_token.shape[-1] == max(lengths)
    assert tokens.dtype.kind == "i"
    assert ((tokens >= 0).sum(1) == lengths).all()
    assert (np.isfinite(by_token).sum(-1) == lengths).all()
    np.testing.assert_allclose(np.nansum(by_token, -1), found.stats["log_likelihood"], atol=1e-8)


@pytest.mark.slow
def test_a_chain_does_not_depend_on_neighbours(run):
    np.testing.assert_allclose(chains(run, TEXTS[:2], 1)[1], chains(run, [TEXTS[1]], 1)[0], **EXACT)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_prior_and_guide(tiny_run, prior, guide):
    """Fit and scores in float64, with and without padding, with jitter, particles and early stopping."""
    run = tiny_run(thoughts=1, thought_width=2)
    run.model.prior = make_prior(prior)
    guide = make_guide(guide, run.model)
    if prior == "EnergyPrior":
        run.model.prior.estimate_normaliser(10)
    stop = Stop(window=2, tolerance=0.5)
    noise = "antithetic" if type(guide).__name__ in GAUSSIAN else "fresh"
    inference = LocalInference(steps=4, rate=0.01, particles=2, noise=noise, stop=stop, init=Init(jitter=0.5))
    rows = [encode_document(run.tokenizer, text) for text in TEXTS[:4]]
    names = ["iwae", "prior"] if guide.has_density else ["prior"]

    def nats(chosen):
        batch = batch_of_rows([rows[i] for i in chosen], run.start_token, run.length)
        problem = fit_problem(run.model, guide, batch, inference, samples=3, seed=4, block=8)
        figures = [estimate(problem, name) for name in names]
        parameters = [x.flatten(1) for x in problem.state.parameters.values()]
        return torch.cat([*parameters, *(x.nats_B[:, None] for x in figures)], dim=1)

    whole = nats([0, 1, 2, 3])
    torch.testing.assert_close(nats([3, 1]), whole[[3, 1]], **EXACT)
    rows.append([1] * run.length)  # a neighbour that pads the others
    torch.testing.assert_close(nats([2, 4])[:1], whole[[2]], **EXACT)
    assert not torch.allclose(whole[0], whole[3])


def test_figures_of_packed_data_do_not_depend_on_batches_or_workers(run):
    data = pack_texts(TEXTS * 2, run.tokenizer, run.length)

    def nats(size, workers, order):
        batches = DataLoader(Subset(data, order), batch_size=size, num_workers=workers, collate_fn=data.collate)
        found = evaluate(run.model, run.guide, batches, run.inference, ["bound", "iwae"], samples=4)
        return [score.nats_per_token for score in found.estimates.values()]

    rows = [*range(len(data))]
    expected = nats(32, 0, rows)
    assert nats(1, 0, rows[::-1]) == pytest.approx(expected, abs=1e-8)
    assert nats(2, 2, rows) == pytest.approx(expected, abs=1e-8)


def test_in_float32_figures_agree_within_a_twentieth_of_their_monte_carlo_error(tiny_run):
    run = tiny_run()
    run.model.float()
    torch.set_default_dtype(torch.float32)
    run = run._replace(guide=MeanField(run.model), inference=LocalInference(steps=16, rate=0.1))
    try:
        for name in ("bound", "iwae"):
            scoring = Scoring(estimator=name, samples=8)
            alone = np.array([score(run, [text], scoring)[0].nats for text in TEXTS])
            others = [[x.nats for x in score(run, TEXTS, replace(scoring, seed=seed))] for seed in range(1, 9)]
            error = np.std(others, axis=0, ddof=1)
            for places, size in orders(TEXTS):
                found = score(run, [TEXTS[i] for i in places], replace(scoring, batch_size=size))
                assert (np.abs(np.array([x.nats for x in found]) - alone[places]) < 0.05 * error[places]).all()
    finally:
        torch.set_default_dtype(torch.float64)


def test_a_seed_and_a_draw_change_a_figure(run):
    first, again, other = (score(run, TEXTS[:1], Scoring(seed=seed))[0].nats for seed in (0, 0, 1))
    assert first == again != other
    texts = generate(run, ["", "", TEXTS[0], ""], Sampling(max_new_tokens=8))
    assert len({texts[0], texts[1], texts[3]}) == 3
    assert generate(run, ["", ""], Sampling(max_new_tokens=8)) == texts[:2]


def test_what_stands_behind_a_context_does_not_change_its_q(run, monkeypatch):
    """The keys of continuations come from the context alone, so that a leak stays impossible."""
    keys = []
    of_batch = RowKeys.of_batch
    monkeypatch.setattr(RowKeys, "of_batch", lambda batch, seed: keys.append(of_batch(batch, seed)) or keys[-1])
    for text in (" model", " long"):
        score_continuations(run, [("the old", text)])
    assert torch.equal(keys[0].key_B, keys[1].key_B)


def test_early_stopping_keeps_each_rows_noise(run):
    """A row that goes on alone takes the steps that it would have taken among others."""
    batch = batch_of_rows([encode_prompt(run.tokenizer, text) for text in TEXTS], run.start_token, run.length)
    inference = LocalInference(steps=12, rate=0.05, stop=Stop(window=3, tolerance=1.0))
    keys = RowKeys.of_batch(batch, 0)
    state, info = infer_local(run.model, run.guide, batch, inference, keys=keys)
    assert len({*info.steps_B.tolist()}) > 1
    for row in range(batch.size):
        index = torch.tensor([row])
        one, _ = infer_local(run.model, run.guide, batch.select(index), inference, keys=keys.select(index))
        torch.testing.assert_close(one.parameters, state.select(index).parameters, **EXACT)
