"""What a Latent-Thought model is weighed against: equal budgets, verdicts that say no more than figures do."""

import pytest
import torch
import yaml

from ltm_pyro.data.make import make_task
from ltm_pyro.data.tasks import Markov
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import write_records
from ltm_pyro.studies.baselines import LTM, MODELS, Baselines, ar_full, masked_diffusion
from ltm_pyro.studies.configure import configure, recipe_file
from ltm_pyro.training.cost_summary import tokens_per_step
from ltm_pyro.training.model_config import build_from_recipe

DECODER = {"layers": 2, "width": 16, "heads": 2, "thoughts": 2, "window": 4, "length": 16}


@pytest.fixture(autouse=True)
def float32(same_ground):
    """As the command line."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    make_task(Markov(symbols=4, tokens=16), folder / "data", 400, (3,), val_fraction=0.1, test_fraction=0.1)
    content = {
        "model": {
            "decoder": {"class_path": "ltm_pyro.models.Decoder", "init_args": DECODER},
            "inference": {"steps": 2},
            "evaluation": {"steps": 2},
            "slow": {"rate": 0.01},
        },
        "data": {"directory": str(folder / "data"), "tokens": 256},
        "trainer": {"log_every_n_steps": 1, "val_check_interval": 3, "limit_val_batches": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture
def baselines(recipe, tmp_path):
    def make(**changed):
        common = {"config": str(recipe), "data": None, "match": "tokens", "budget": "2560tokens", "seeds": (0, 1)}
        common |= {"rates": (1.0,), "share": 0.2, "samples": 2, "limit": None, "out": tmp_path / "out"}
        return Baselines(**common | changed)

    return make


def built(config):
    config.model.vocabulary = config.model.vocabulary or 50
    return build_from_recipe(config).model


@pytest.mark.parametrize("recipe", ["cpu-small.yaml", "quickstart.yaml", "in-context.yaml", "ltm-small.yaml"])
def test_every_recipe_has_its_baselines(recipe):
    arguments = configure(recipe_file(recipe), {}).model.decoder.init_args.as_dict()
    full = configure(recipe_file(recipe), ar_full(arguments)).model.decoder.init_args
    assert (full.thoughts, full.window, full.layers) == (0, arguments["length"], arguments["layers"])
    small = {"width": 16, "heads": 2, "layers": 2}
    model = built(configure(recipe_file(recipe), masked_diffusion(arguments | small)))
    assert type(model).__name__ == "MaskedDiffusionModel"
    assert (model.decoder.length, model.decoder.width) == (arguments["length"], 16)


def test_budgets_are_equal_in_what_is_asked_for(baselines):
    for unit in ("flops", "tokens"):
        made = baselines(match=unit, budget=f"1e6{unit}")
        for model in MODELS:
            whole, share = (made.configure(model, share=x) for x in (1.0, 0.2))
            if unit == "flops":
                assert (whole.model.max_flops, share.model.max_flops) == (1e6, 2e5)
                assert whole.trainer.max_steps == -1
            else:
                assert whole.trainer.max_steps == round(1e6 / tokens_per_step(whole))
                assert whole.model.max_flops is None
            assert made.configure(model, rate=0.5, seed=3).seed_everything == 3
            assert made.configure(model, rate=0.5).model.slow.rate == pytest.approx(0.005)
    sizes = {}
    for model in MODELS:
        found = built(baselines(match="parameters").configure(model))
        sizes[model] = sum(p.numel() for p in found.parameters())
    assert all(abs(size / sizes[LTM] - 1) < 0.2 for size in sizes.values()), sizes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": "5"}, r"The budget '5' is no amount: give 2e12flops or 4e6tokens"),
        ({"budget": "1e6flops"}, "--match tokens needs a budget in tokens, got 1e6flops"),
        ({"match": "flops", "budget": "10flops"}, "0.2 of the budget 10flops is less than one step of latent-thought"),
    ],
)
def test_bad_budgets_are_refused(baselines, changed, said):
    with pytest.raises(UsageError, match=said):
        baselines(**changed).check()


def records(nats):
    return [{"file": "a", "id": n, "tokens": 10, "bytes": 10, "bound_nats": x} for n, x in enumerate(nats)]


@pytest.mark.parametrize(
    ("model", "above", "said"),
    [
        ("autoregressive", -1.0, "below the exact figure of autoregressive: it is better."),
        ("autoregressive-full", 1.0, "above the exact figure of autoregressive-full: that proves nothing"),
        ("masked-diffusion", -1.0, "below the bound of masked-diffusion: of two bounds neither says"),
        ("autoregressive", 0.0, "they cannot be told apart"),
    ],
)
def test_a_verdict_says_no_more_than_the_figures(baselines, model, above, said):
    made, noise = baselines(), torch.randn(40).tolist()
    for seed, shift in ((0, 0.1), (1, -0.1)):
        for name, nats in ((LTM, 20 + above), (model, 20)):
            made.run(name, seed).mkdir(parents=True)
            mine = [
                nats + 5 * x + (shift if name == LTM else 0) + 0.3 * y
                for x, y in zip(noise, torch.randn(40).tolist(), strict=True)
            ]
            write_records(made.run(name, seed), records(mine))
    found = made.difference(model)
    assert found["nats_per_token"] == pytest.approx(above / 10, abs=3 * found["stderr"])
    assert found["stderr"] == pytest.approx((found["over_documents"] ** 2 + found["over_seeds"] ** 2) ** 0.5)
    assert found["over_documents"] < 0.02, "what is common to both models of a document is in no error"
    assert said in made.verdict(model)


def test_a_folder_of_other_baselines_is_refused(baselines):
    baselines().write_settings()
    baselines().write_settings()
    with pytest.raises(UsageError, match="baselines of another recipe, data or options"):
        baselines(seeds=(0,)).write_settings()
