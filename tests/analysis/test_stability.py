"""Agreement of two posteriors up to a rotation: what is shared is found, and what is not is not."""

import numpy as np
import pytest
import xarray as xr

from ltm_pyro.analysis.posterior import SEQUENCES, Posterior
from ltm_pyro.analysis.probes import holm
from ltm_pyro.analysis.stability import agreement, procrustes
from ltm_pyro.errors import UsageError


def of_means(x_ND, names=None):
    """A posterior that has nothing but means."""
    names = np.array([f"d{n}" for n in range(len(x_ND))] if names is None else names, dtype=object)
    axes = ("sequence", "layer", "thought", "dim")
    return Posterior(
        xr.DataTree.from_dict(
            {
                SEQUENCES: xr.Dataset({"mean": (axes, x_ND[:, None, None])}),
                "constant_data": xr.Dataset({"document": ("sequence", names)}),
            }
        )
    )


def rotation(size, random):
    return np.linalg.qr(random.normal(size=(size, size)))[0]


def test_a_rotated_shifted_and_scaled_copy_agrees_wholly():
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 6))
    found = agreement(of_means(x), of_means(3 * x @ rotation(6, random) + 5), permutations=99)
    assert found.r2 == pytest.approx(1)
    np.testing.assert_allclose(found.correlations, 1, atol=1e-6)
    assert found.neighbours == 1
    assert found.p_value == 0.01


def test_noise_takes_away_its_share():
    """y = x R + noise of the same variance: half of y is explained by x, and less of x by y."""
    random = np.random.default_rng(1)
    x = random.normal(size=(4000, 4))
    y = x @ rotation(4, random) + random.normal(size=(4000, 4))
    # Procrustes has one scale and a rotation, so the map of y onto x is y Rᵀ / 2, which explains half of x as well
    assert agreement(of_means(x[:2000]), of_means(y[:2000]), permutations=19).r2 == pytest.approx(0.5, abs=0.04)


def test_documents_are_matched_by_name_not_by_place():
    random = np.random.default_rng(2)
    x, order = random.normal(size=(40, 3)), random.permutation(40)
    names = np.array([f"d{n}" for n in range(40)])
    assert agreement(of_means(x, names), of_means(x[order], names[order]), permutations=19).r2 == pytest.approx(1)


@pytest.mark.parametrize("repeats", [pytest.param(20, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)])
def test_unrelated_thoughts_seldom_agree(repeats):
    """Also with more coordinates than documents, where an alignment fits everything that it has seen."""
    random = np.random.default_rng(3)
    small = []
    for _ in range(repeats):
        found = agreement(of_means(random.normal(size=(30, 40))), of_means(random.normal(size=(30, 40))), 19)
        small.append(found.p_value <= 0.05)
        assert found.r2 < 0.2
    assert sum(small) <= repeats * 0.05 + 3 * (repeats * 0.05 * 0.95) ** 0.5


def test_procrustes_finds_the_map_between_other_widths():
    random = np.random.default_rng(4)
    x = random.normal(size=(50, 3))
    map_DE, center_D, center_E = procrustes(x, np.hstack([x @ rotation(3, random), np.zeros((50, 2))]) + 1)
    np.testing.assert_allclose(map_DE @ map_DE.T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(center_E, 1 + (center_D @ map_DE), atol=1)


def test_other_documents_are_refused():
    x = np.random.default_rng(5).normal(size=(25, 3))
    with pytest.raises(UsageError, match="does not have document d20"):
        agreement(of_means(x), of_means(x[:20]))
    with pytest.raises(UsageError, match="at least 20 documents, got 3"):
        agreement(of_means(x[:3]), of_means(x[:3]))
    with pytest.raises(UsageError, match="give at least 19"):
        agreement(of_means(x), of_means(x), permutations=-1)


def test_holm_is_what_a_loop_gives():
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    expected, largest = np.empty(4), 0.0
    for rank, index in enumerate(np.argsort(p.ravel())):
        largest = max(largest, min(1.0, p.ravel()[index] * (4 - rank)))
        expected[index] = largest
    np.testing.assert_allclose(holm(p), expected.reshape(2, 2))
