"""Tasks: optimum and best within a reach against brute force, and as much for context to carry as was promised."""

import itertools
import math
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import chi2, norm

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.make import make_task
from ltm_pyro.data.manifest import read_manifest
from ltm_pyro.data.tasks import TASKS, Copy, Markov, Permutation, Recall, Regression, Task, Topics, register_task
from ltm_pyro.errors import UsageError


def permutation_law(task, x):
    functions = np.array([*itertools.permutations(range(task.symbols))])
    agrees = [(f[x[:, ::2]] == x[:, 1::2]).all(1) for f in functions]
    return np.mean(agrees, 0) / task.symbols**task.pairs


def markov_law(task, x):
    a, V = task.alpha, task.symbols
    counts = np.array([[[((r[:-1] == i) & (r[1:] == j)).sum() for j in range(V)] for i in range(V)] for r in x])
    rows = gammaln(V * a) - gammaln(V * a + counts.sum(2)) + (gammaln(a + counts) - gammaln(a)).sum(2)
    return np.exp(rows.sum(1)) / V


def topics_law(task, x):
    return np.mean([m[x].prod(1) for m in task.mixtures_MV], 0)


def recall_law(task, x):
    found, keys, P = {}, range(task.keys), task.pairs
    for shown in itertools.permutations(keys, P):
        for values in itertools.product(range(task.keys, task.vocabulary), repeat=P):
            for asked in itertools.product(range(P), repeat=task.queries):
                pairs = [*zip(shown, values, strict=True), *((shown[i], values[i]) for i in asked)]
                sequence = tuple(itertools.chain(*pairs))
                found[sequence] = found.get(sequence, 0) + 1
    total = sum(found.values())
    return np.array([found.get(tuple(row), 0) / total for row in x.tolist()])


def copy_law(task, x):
    n = task.string
    same = (x[:, :n] == x[:, n + 1 :]).all(1) & (x[:, n] == task.symbols) & (x[:, :n] < task.symbols).all(1)
    return same / task.symbols**n


def regression_law(task, x):
    """The midpoint rule on a grid that is much finer than the nodes."""
    at = (np.arange(400) + 0.5) / 200 - 1
    a, b = np.repeat(at, 400), np.tile(at, 400)
    edges = [-math.inf, *np.linspace(-2, 2, task.y_bins + 1)[1:-1], math.inf]
    centres = (np.arange(task.x_bins) + 0.5) / task.x_bins * 2 - 1
    of = {
        (i, j): norm.cdf((edges[j + 1] - a * c - b) / task.noise) - norm.cdf((edges[j] - a * c - b) / task.noise)
        for i, c in enumerate(centres)
        for j in range(task.y_bins)
    }
    points = [[*zip(row[::2], row[1::2] - task.x_bins, strict=True)] for row in x]
    products = [np.prod([of[point] for point in row], 0).mean() for row in points]
    return np.array(products) / task.x_bins**task.pairs


SMALL = [  # a task, its law by enumeration of what is latent, and how exact that and the best within a reach are
    (Permutation(3, 3), permutation_law, 1e-9, 1e-9),
    (Permutation(2, 4), permutation_law, 1e-9, 1e-9),
    (Markov(3, 6, 0.5), markov_law, 1e-9, 2e-3),
    (Markov(2, 8, 0.3), markov_law, 1e-9, 2e-3),
    (Topics(3, 3, 6, 0.5), topics_law, 1e-9, 1e-9),
    (Topics(3, 3, 5, 1.0, parts=2), topics_law, 1e-9, 1e-9),
    (Recall(3, 2, 2, 3), recall_law, 1e-9, 1e-9),
    (Recall(4, 2, 3, 1), recall_law, 1e-9, 1e-9),
    (Recall(2, 3, 2, 2), recall_law, 1e-9, 1e-9),
    (Copy(2, 3), copy_law, 1e-9, 1e-9),
    (Regression(2, 3, 2, 0.25), regression_law, 1e-4, 1e-9),
    (Regression(2, 3, 3, 0.5), regression_law, 1e-4, 1e-9),
]


def everything(task):
    """All sequences of tokens that may come at their positions."""
    drawn = task.sample(2_000, np.random.default_rng(1))
    return np.array([*itertools.product(*(sorted({*column}) for column in drawn.T.tolist()))])


def entropy_of_one_more(x, p, t, reach):
    """H(x_t | the ``reach`` tokens before it), in nats, of the law ``p`` over all sequences ``x``."""

    def entropy(part):
        _, which = np.unique(part, axis=0, return_inverse=True)
        q = np.bincount(which.ravel(), p)
        return -(q[q > 0] * np.log(q[q > 0])).sum()

    first = max(0, t - reach)
    return entropy(x[:, first : t + 1]) - (entropy(x[:, first:t]) if t > first else 0)


def test_every_task_is_tested():
    ours = {name for name, x in TASKS.items() if x.__module__.startswith("ltm_pyro.") and issubclass(x, Task)}
    assert {type(task) for task, *_ in SMALL} == {TASKS[name] for name in ours}


@pytest.mark.parametrize(("task", "law", "exact", "close"), SMALL, ids=[str(task) for task, *_ in SMALL])
def test_the_optimum_and_the_best_within_a_reach_are_those_of_brute_force(task, law, exact, close):
    x = everything(task)
    p, expected = np.exp(-task.sequence_nats(x)), law(task, x)
    assert p.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(p, expected, atol=1e-15, rtol=exact)
    x, p = x[p > 0], p[p > 0]
    assert np.isfinite(task.sequence_nats(x, 2)).all()
    for reach in range(task.length + 1):
        best = [entropy_of_one_more(x, p, t, reach) for t in range(task.length)]
        assert p @ task.nats(x, reach) == pytest.approx(best, abs=close)
        assert p @ task.sequence_nats(x, reach) == pytest.approx(sum(best), abs=close)
    assert p @ task.sequence_nats(x) == pytest.approx(-(p @ np.log(p)), abs=1e-9)


@pytest.mark.parametrize("task", [task for task, *_ in SMALL], ids=str)
def test_sequences_come_as_often_as_they_should(task):
    """Pearson's chi-squared of 20,000 draws, rare sequences taken together, at the level 0.001."""
    x, drawn = everything(task), task.sample(20_000, np.random.default_rng(5))
    assert np.isfinite(task.sequence_nats(drawn)).all()
    base = task.vocabulary ** np.arange(task.length)
    expected = dict(zip((x @ base).tolist(), 20_000 * np.exp(-task.sequence_nats(x)), strict=True))
    counts = dict(zip(*(each.tolist() for each in np.unique(drawn @ base, return_counts=True)), strict=True))
    cells = {key: (counts.get(key, 0), value) for key, value in expected.items() if value > 5}
    rest = np.array([(counts.get(key, 0), value) for key, value in expected.items() if key not in cells])
    found = np.array([*cells.values(), *([rest.sum(0)] if len(rest) else [])])
    found = found[found[:, 1] > 1]
    assert ((found[:, 0] - found[:, 1]) ** 2 / found[:, 1]).sum() < chi2.isf(1e-3, len(found) - 1)


@pytest.mark.parametrize("name", sorted(name for name, found in TASKS.items() if issubclass(found, Task)))
def test_the_mean_is_the_entropy_and_the_seed_decides(name):
    """At default sizes: two halves of the draws agree within five standard errors, equal seeds give equal draws."""
    task = TASKS[name]()
    x, again = (task.sample(600, np.random.default_rng(3)) for _ in range(2))
    assert x.shape == (600, task.length)
    assert 0 <= x.min() <= x.max() < task.vocabulary
    assert (x == again).all()
    assert (x != task.sample(600, np.random.default_rng(4))).any()
    for reach in (0, 3, None):
        nats_N = task.sequence_nats(x, reach)
        mean, stderr = task.best_within(reach, 600, seed=8)
        error = math.hypot(stderr, nats_N.std() / math.sqrt(600))
        assert abs(nats_N.mean() - mean) <= 5 * error + 1e-9
    ordered = [task.sequence_nats(x, reach).mean() for reach in (0, 1, 3, 5, None)]
    assert all(more >= less - 0.25 for more, less in itertools.pairwise(ordered))


def test_the_numbers_of_the_trial_run_on_permutation():
    """Reach 3, two layers of window 2, is two tokens of the last pair and the symbol whose image comes."""
    task = Permutation(symbols=6, pairs=24)
    found = [task.best_within(reach) for reach in (0, 3, None)]
    assert [round(nats, 2) for nats, _ in found] == [86.0, 75.64, 49.58]
    assert {error for _, error in found} == {0.0}


PROMISED = [  # a task, the reach, and what context beyond it is worth at least, in nats per sequence
    (Permutation(6, 24), 7, 10),
    (Markov(6, 64, 0.3), 5, 10),
    (Topics(8, 64, 64), 3, 10),
    (Recall(pairs=8, queries=8), 7, 10),
    (Copy(), 7, 10),
]


@pytest.mark.parametrize(("task", "reach", "least"), PROMISED, ids=str)
def test_there_is_something_to_carry(task, reach, least):
    """The difference, less three of its standard errors, over 500 sequences."""
    x = task.sample(500, np.random.default_rng(0))
    above_N = task.sequence_nats(x, reach) - task.sequence_nats(x)
    print(f"{task}: {above_N.mean():.2f} ± {above_N.std() / math.sqrt(500):.2f} nats beyond reach {reach}")
    assert above_N.mean() - 3 * above_N.std() / math.sqrt(500) > least


def test_twice_as_many_nodes_change_no_figure_of_regression():
    class Finer(Regression):
        @property
        def _nodes(self):
            return 2 * super()._nodes

    x = Regression().sample(40, np.random.default_rng(0))
    assert np.abs(Finer().sequence_nats(x) - Regression().sequence_nats(x)).max() < 1e-4


def test_other_sequences_may_be_of_the_same_world():
    first, second, other = Topics(world=3), Topics(world=3, tokens=9), Topics(world=4)
    assert (first.mixtures_MV == second.mixtures_MV).all()
    assert (first.mixtures_MV != other.mixtures_MV).any()


REFUSED = [
    (lambda: Permutation(symbols=1), "The task permutation has --symbols 1: give a number from 2 to 1000."),
    (lambda: Recall(keys=4, pairs=5), "The task recall has --pairs 5: give a number from 1 to 4."),
    (lambda: Topics(topics=50, parts=9), "mixtures: lower one of them"),
    (lambda: Regression(noise=0.01), "too sharp to integrate: raise --noise"),
    (lambda: Regression(x_bins=9000, y_bins=9000), "lower --x-bins or --y-bins"),
    (lambda: Markov().sequence_nats(np.zeros((2, 64), int), 12), "a reach of 12 tokens is not known for markov"),
    (lambda: register_task("copy")(Markov), "There is a task 'copy' already"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_no_task_can_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_pack_has_what_is_known_of_each_sequence(tmp_path):
    task = Permutation(symbols=4, pairs=5)
    about = {"name": "permutation", "options": asdict(task)}
    made = make_task(task, tmp_path / "a", 300, (3, 99), about=about, val_fraction=0.2, seed=7)
    again = make_task(task, tmp_path / "b", 300, (3, 99), about=about, val_fraction=0.2, seed=7)
    assert (made.manifest, made.manifest.digest) == (again.manifest, read_manifest(tmp_path / "b").digest)
    assert made.manifest.task == about
    assert sum(split.sequences for split in made.manifest.splits.values()) == 300
    rows = [row for split in made.manifest.splits for row in PackedDataset.open(tmp_path / "a", split)]
    tokens = np.array([row.tokens_T.tolist() for row in rows])
    of = [part.document for row in rows for part in row.parts]
    np.testing.assert_allclose([x.exact_nats for x in of], task.sequence_nats(tokens))
    np.testing.assert_allclose([x.labels["best_within_3"] for x in of], task.sequence_nats(tokens, 3))
    np.testing.assert_allclose([x.labels["best_within_99"] for x in of], task.sequence_nats(tokens))
    assert made.costs["optimum"].nats == pytest.approx(task.sequence_nats(tokens).mean())
    assert made.costs["best within 99"].excess == 0


@pytest.fixture
def registered():
    """A task of one's own, as long as the test runs."""

    @register_task("coins")
    @dataclass
    class Coins(Task):
        """x_t ~ Bernoulli(q), independent, the same q for all.

        Args:
            tokens: T
            heads: q
        """

        tokens: int = 8
        heads: float = 0.25

        def __post_init__(self):
            self.vocabulary, self.length = 2, self.tokens

        def sample(self, count, rng):
            return (rng.random((count, self.tokens)) < self.heads).astype(int)

        def nats(self, tokens_NT, reach=None):
            return -np.log(np.where(tokens_NT == 1, self.heads, 1 - self.heads))

    yield Coins
    del TASKS["coins"]


def test_a_task_of_ones_own_needs_only_its_law(registered, tmp_path):
    assert TASKS["coins"] is registered
    made = make_task(registered(tokens=4), tmp_path / "coins", 100)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert made.costs["optimum"].nats == pytest.approx(4 * entropy, abs=5 * made.costs["optimum"].stderr)
    assert made.manifest.exact


def test_a_manifest_with_more_than_plain_options_is_refused(tmp_path):
    make_task(Copy(2, 2), tmp_path / "a", 50, about={"name": "copy", "options": {}})
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace('"options": {}', '"options": {"class": ["os.system"]}'))
    with pytest.raises(UsageError, match="its task is no name with options"):
        read_manifest(tmp_path / "a")
