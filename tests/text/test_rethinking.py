"""Rethinking: `gibbs` leaves p(z, y | x) as it is, found by enumeration; `rethink` is as wrong as its q."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy import stats

from ltm_pyro.analysis.rethinking import rethinking_tree
from ltm_pyro.contracts import make_batch
from ltm_pyro.data.tokenizer import number_tokenizer, vocabulary_size
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField, Point
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import decode
from ltm_pyro.text.rethinking import Rethinking, rethink
from ltm_pyro.text.sampling import Sampling

NEW, PROMPT, CHAINS = 3, "1", 1_000
SAMPLING = Sampling(max_new_tokens=NEW)


@contextmanager
def double():
    """A fixture of a module is made before each test sets the default dtype."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(outside)


@pytest.fixture(scope="module")
def run():
    """Two symbols and one number of thought, on which the text depends strongly."""
    with double():
        torch.manual_seed(4)
        tokenizer = number_tokenizer(2)
        decoder = Decoder(vocabulary_size(tokenizer), 1, 8, 2, thoughts=1, window=4, length=6, thought_width=1)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.mul_(5 if "embedding" in name else 2)
        model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder).eval()
        return Run(model, MeanField(model), tokenizer, LocalInference(steps=8, rate=0.3), "", 6)


def exact_law(run):
    """The texts that can follow the prompt, a grid of z, and p(z, y | x) on both."""
    tokens = run.tokenizer.encode(PROMPT, add_special_tokens=False).ids
    symbols = [x for x in range(vocabulary_size(run.tokenizer)) if x != run.start_token]
    texts = [y for n in range(NEW + 1) for y in itertools.product(symbols, repeat=n)]
    rows = [[*tokens, *y, *([run.start_token] if len(y) < NEW else [])] for y in texts]
    length = max(map(len, rows))
    padded = torch.tensor([[*row, *[run.start_token] * (length - len(row))] for row in rows])
    batch = run.model.prepare(make_batch(padded, torch.tensor([*map(len, rows)]), run.start_token))
    if run.score == "completion":
        batch = batch._replace(mask_BT=batch.mask_BT & (torch.arange(length) >= len(tokens)))
    grid_G = torch.linspace(-6, 6, 481)
    with torch.no_grad():
        joint_GY = torch.stack(
            [
                run.model.observation(z.expand(len(rows), 1, 1, 1), batch).log_prob(batch.targets_BT) - z**2 / 2
                for z in grid_G
            ]
        ).exp()
    return decode(run, texts), grid_G.numpy(), (joint_GY / joint_GY.sum()).numpy()


@pytest.fixture(scope="module")
def exact(run):
    """The exact law of the run."""
    with double():
        return exact_law(run)


def p_value(words, grid_G, joint_GY, texts, z):
    """Of a chi-square test of texts, each with the sign of its z, against the exact joint law."""
    negative_G = (grid_G < 0) + 0.5 * (grid_G == 0)
    expected = np.stack([negative_G @ joint_GY, (1 - negative_G) @ joint_GY], 1).flatten() * len(texts)
    place = {word: number for number, word in enumerate(words)}
    found = np.bincount(
        [2 * place[text] + (value > 0) for text, value in zip(texts, z, strict=True)], minlength=len(expected)
    )
    common = expected >= 5
    cells = [(found[common], expected[common]), ([found[~common].sum()], [expected[~common].sum()])]
    counts, means = (np.concatenate([cell[side] for cell in cells]) for side in (0, 1))
    return stats.chisquare(counts[means > 0], means[means > 0] * counts.sum() / means.sum()).pvalue


def drafts(run, iterations, target, **options):
    """The last texts of many chains, and the z that each was written from."""
    (found,) = rethink(
        run, [PROMPT], Rethinking(iterations=iterations, target=target, chains=CHAINS, **options), SAMPLING
    )
    return found.drafts[-1], found.z_NCLKD[-1].flatten(), found


@pytest.mark.parametrize(
    ("score", "inference"),
    [
        ("all", LocalInference(steps=1, rate=1.5)),  # q is far off, for the prompt and as a proposal
        ("completion", LocalInference(steps=30, rate=0.3)),  # of which the first q has seen the prompt
    ],
)
def test_gibbs_has_the_exact_law_from_a_bad_start_too(run, score, inference):
    run = run._replace(score=score)
    exact = exact_law(run)
    assert p_value(*exact, *drafts(run, 0, "gibbs", inference=inference)[:2]) < 1e-6
    texts, z, found = drafts(run, 15, "gibbs", inference=inference)
    assert p_value(*exact, texts, z) > 0.01
    assert 0.05 < found.accepted_NC[1:].mean() < 0.95


def distance(exact, texts):
    """The total variation between the law of texts and the exact one."""
    words, _, joint_GY = exact
    return sum(abs(texts.count(word) / len(texts) - p) for word, p in zip(words, joint_GY.sum(0), strict=True)) / 2


def test_rethinking_is_as_wrong_as_its_q(run, exact):
    """With a q near the posterior the law is nearly exact; with a poor one, or at a low temperature, it is not."""
    good, poor = (LocalInference(steps=steps, rate=rate) for steps, rate in ((30, 0.3), (1, 1.5)))
    near, far = (drafts(run, 10, "rethink", inference=inference)[0] for inference in (good, poor))
    assert distance(exact, near) < 0.06
    assert distance(exact, far) > 2 * distance(exact, near)
    rethinking = Rethinking(iterations=10, chains=CHAINS)
    (found,) = rethink(run, [PROMPT], rethinking, Sampling(max_new_tokens=NEW, temperature=0.3))
    assert distance(exact, found.drafts[-1]) > 2 * distance(exact, near)


def test_ancestral_draws_are_new_each_time(run):
    (found,) = rethink(run, [PROMPT], Rethinking(iterations=3, target="ancestral", chains=4), SAMPLING)
    assert len({*found.z_NCLKD.flatten().round(12)}) == 16
    assert found.accepted_NC.all()


def test_a_result_depends_on_its_prompt_alone(run):
    options = Rethinking(iterations=3, chains=2)
    together = rethink(run, ["0", "1 0", "1"], options, SAMPLING, seed=5)
    assert [x.drafts for x in rethink(run, ["0", "1 0", "1"], options, SAMPLING, seed=5, batch_size=1)] == [
        x.drafts for x in together
    ]
    alone = rethink(run, ["1 0"], options, SAMPLING, seed=5)[0]
    assert alone.drafts == together[1].drafts
    np.testing.assert_allclose(alone.elbo_NC, together[1].elbo_NC)
    assert rethink(run, ["1 0"], options, SAMPLING, seed=6)[0].drafts != alone.drafts


def test_what_is_kept(run):
    kept = {}
    for keep in ("last", "elbo", "likelihood", "majority"):
        (found,) = rethink(run, [PROMPT], Rethinking(iterations=4, chains=5, keep=keep), SAMPLING)
        kept[keep] = found.text
    flat = [
        (elbo, likelihood, text)
        for row in zip(found.elbo_NC, found.log_likelihood_NC, found.drafts, strict=True)
        for elbo, likelihood, text in zip(*row, strict=True)
    ]
    assert kept["last"] == found.drafts[-1][0]
    assert kept["elbo"] == max(flat)[2]
    assert kept["likelihood"] == max((likelihood, text) for _, likelihood, text in flat)[1]
    assert found.drafts[-1].count(kept["majority"]) == max(map(found.drafts[-1].count, found.drafts[-1]))


def test_it_ends_where_nothing_changes_and_at_an_interruption(run):
    (found,) = rethink(run, [PROMPT], Rethinking(iterations=60, patience=3), SAMPLING)
    assert 4 <= len(found.drafts) < 61
    assert found.drafts[-4:] == [found.drafts[-1]] * 4

    def interrupt(iteration):
        if iteration == 2:
            raise KeyboardInterrupt

    (found,) = rethink(run, PROMPT, Rethinking(iterations=60), SAMPLING, progress=interrupt)
    assert len(found.drafts) == 3
    found = rethink(run, [PROMPT, "0", "1 1"], Rethinking(iterations=60), SAMPLING, batch_size=2, progress=interrupt)
    assert [len(x.drafts) for x in found] == [3, 3]
    assert rethink(run, [], Rethinking(), SAMPLING) == []


@pytest.mark.parametrize(
    ("options", "sampling", "said"),
    [
        ({"chains": 0}, {}, "chains ≥ 1"),
        ({"target": "gibbs", "patience": 2}, {}, "The target gibbs has no patience"),
        ({}, {"num_return_sequences": 2}, "ask for as many chains instead"),
        ({"labels": {"source": "a"}}, {}, "does not ask for the label 'source'"),
        ({"target": "gibbs"}, {"temperature": 0.5}, "leave greedy, temperature, filters and penalty out"),
    ],
)
def test_what_cannot_be_is_refused(run, options, sampling, said):
    with pytest.raises(UsageError, match=said):
        rethink(run, [PROMPT], Rethinking(**options), Sampling(max_new_tokens=NEW, **sampling))


def test_gibbs_needs_a_density(run):
    run = run._replace(guide=Point(run.model))
    with pytest.raises(UsageError, match="needs the density of q, and Point has none"):
        rethink(run, [PROMPT], Rethinking(target="gibbs"), SAMPLING)
    with pytest.raises(UsageError, match="no ELBO to keep a draft by, because Point has no density"):
        rethink(run, [PROMPT], Rethinking(keep="elbo"), SAMPLING)
    (found,) = rethink(run, [PROMPT], Rethinking(iterations=2), SAMPLING)
    assert np.isnan(found.elbo_NC).all()
    assert np.isfinite(found.log_likelihood_NC).all()


def test_a_q_that_sees_prompts_alone_is_not_rethought(run):
    run = run._replace(score="completion", observe="prompt")
    with pytest.raises(UsageError, match="sees prompts alone"):
        rethink(run, [PROMPT], Rethinking(), SAMPLING)
    assert len(rethink(run, [PROMPT], Rethinking(target="ancestral", iterations=1), SAMPLING)[0].drafts) == 2


def test_the_end_of_a_text_is_scored_and_a_cut_is_not(run):
    """By hand: log p(y | z, x) with the end behind a text that is shorter than was asked for."""
    (found,) = rethink(run, [PROMPT], Rethinking(iterations=0, chains=40), SAMPLING)
    (prompt,) = run.tokenizer.encode(PROMPT, add_special_tokens=False).ids
    lengths = set()
    for chain, text in enumerate(found.drafts[0]):
        new = [run.tokenizer.token_to_id(symbol) for symbol in text]
        end = [run.start_token] if len(new) < NEW else []
        inputs = torch.tensor([[run.start_token, prompt, *new]])
        z_BLKD = torch.from_numpy(found.z_NCLKD[0, chain])[None]
        with torch.no_grad():
            logits_TV = run.model.decoder.logits(run.model.decoder(run.model.decoder.stem(inputs), z_BLKD))[0, 1:]
        log_p = sum(logits_TV[t].log_softmax(-1)[token] for t, token in enumerate([*new, *end]))
        assert found.log_likelihood_NC[0, chain] == pytest.approx(float(log_p))
        lengths.add(len(new))
    assert {NEW, 0} <= lengths


def test_the_drafts_are_a_tree_of_datasets(run):
    (found,) = rethink(run, [PROMPT], Rethinking(iterations=3, chains=2), SAMPLING)
    tree = rethinking_tree(found)
    assert dict(tree["posterior"].sizes) == {"chain": 2, "draw": 4, "layer": 1, "thought": 1, "dim": 1}
    assert float(tree["sample_stats"]["elbo"][1, 3]) == found.elbo_NC[3, 1]
    assert str(tree["text"]["draft"].values[1, 3]) == found.drafts[3][1]
