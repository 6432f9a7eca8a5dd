"""No option, no key of a recipe and no public name without a user; `tests/usage.py` lists who uses what."""

import pytest

from tests.usage import ROOT, is_used, options, public_names, recipe_keys, users, words_of


def test_everything_public_has_a_user():
    found = users()
    assert len(found) > 200
    assert not [name for name, those in found.items() if not those]


def test_what_is_public_is_listed():
    assert {"ltm_pyro.infer_local", "ltm_pyro.analysis.Posterior", "ltm_pyro.models.Decoder"} <= {*public_names()}
    assert {"evaluate --estimators", "study run --trials", "data pack --seq-len"} <= {*options()}
    listed = {"seed_everything", "model.inference.init.jitter", "model.decoder.window", "MixturePrior.components"}
    assert listed <= {*recipe_keys()}
    assert not [key for key in recipe_keys() if key.startswith(("trainer", "model.evaluation.")) or key == "model"]


WRITTEN = {  # file -> its text, and what of the names below it uses
    "a.py": ("score(run, LocalInference(steps=3))", {"ltm_pyro.score", "model.inference.steps"}),
    "b.py": ("def test(): ltm('data', 'show', 'pack', '--seed', 3)", {"data show --seed"}),
    "c.py": ("A = ('data', 'show')\nB = ('--seed', 3)", set()),
    "d.py": ("PRIORS = {'MixturePrior': {'components': 3}}", {"MixturePrior.components"}),
    "e.py": ("ltm('fit', '--model.evaluation.steps', 3)", {"model.inference.steps"}),
    "f.py": ("WIDE = {'window': 3}", {"model.decoder.window"}),
    "g.py": ("'we score in steps of a window, as data show'", set()),
    "h.yaml": ("model: {evaluation: {steps: 3}}", {"model.inference.steps"}),
    "i.yaml": (
        "model: {prior: {class_path: ltm_pyro.models.MixturePrior, init_args: {components: 2}}}",
        {"MixturePrior.components"},
    ),
    "j.yaml": ("slow: {steps: 3}", set()),
    "k.md": ("```\nltm data show PACK \\\n  --seed 3\n```", {"data show --seed"}),
    "l.md": ("`ltm data show PACK` takes `--seed 3`; `score` it.", {"data show --seed", "ltm_pyro.score"}),
    "m.md": ("A field of `LocalInference`: `steps`.", {"model.inference.steps"}),
    "n.md": ("The score in steps, and ltm data show --seed.", set()),
    "o.sh": ("ltm fit --model.prior a.MixturePrior --model.prior.components 4", {"MixturePrior.components"}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_users_are_found_and_nothing_else_is(name, tmp_path):
    text, expected = WRITTEN[name]
    (tmp_path / name).write_text(text)
    words = words_of(tmp_path / name)
    names = {"ltm_pyro.score", "data show --seed", "model.inference.steps", "MixturePrior.components"}
    found = {each for each in names if is_used(each, words)}
    assert found | {key for key in ["model.decoder.window"] if is_used(key, words, alone=True)} == expected


def test_a_contributor_is_told():
    assert "tests/usage.py" in (ROOT / "CONTRIBUTING.md").read_text()
