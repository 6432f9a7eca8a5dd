"""The `model` part of a recipe, and what it builds: loading a run needs this file and none that trains."""

import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from jsonargparse._actions import _ActionConfigLoad  # there is no public name for them
from pyro.nn import PyroModule
from torch import nn
from yaml import YAMLError

from ltm_pyro.contracts import Guide, Model, TextModel, ThoughtShape
from ltm_pyro.data.dataset import Observed, Scored
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.training import plugins
from ltm_pyro.training.old_recipe_keys import dotted_keys, refuse_old_keys
from ltm_pyro.training.trust import check_classes, check_code, check_plain, copies_beside, known_class
from ltm_pyro.utils.safe_yaml import load_yaml

DEFAULTS = {  # by dotted path: this room imports no model and no guide
    "model.decoder": {"class_path": "ltm_pyro.models.Decoder"},
    "model.prior": {"class_path": "ltm_pyro.models.GaussianPrior"},
    "model.joint": {"class_path": "ltm_pyro.models.LatentThoughtModel"},
    "model.guide": {"class_path": "ltm_pyro.guides.MeanField"},
}
TRAINING_KEYS = ("slow", "curriculum", "max_flops", "keep_local", "on_nonfinite")  # of `model`, not read to load a run


class BuiltModel(NamedTuple):
    """What the `model` part of a recipe describes."""

    model: TextModel  # p(x, z)
    guide: Guide  # q(z | x)
    inference: LocalInference  # while training
    evaluation: LocalInference  # while validating and afterwards


def build_model(
    decoder: Callable[[int], nn.Module],
    prior: Callable[[ThoughtShape], PyroModule],
    joint: Callable[[PyroModule, nn.Module], PyroModule],
    guide: Callable[[Model], Guide],
    inference: LocalInference = LocalInference(),  # noqa: B008 - frozen
    evaluation: LocalInference = LocalInference(steps=32, rate=0.1),  # noqa: B008
    vocabulary: int | None = None,
    compile: bool = False,
) -> BuiltModel:
    """Builds decoder, prior, joint model and guide, in this order.

    Args:
        decoder: makes p(x | z)'s network for a vocabulary.
        prior: makes p(z) for a `ThoughtShape`.
        joint: makes the Pyro model from prior and decoder, and checks the prior (`ltm_pyro.inference.check_prior`).
        guide: makes q's family for the model.
        inference: local inference while training.
        evaluation: local inference while validating, and the default of ``ltm evaluate``.
        vocabulary: V; the data's when not given.
        compile: lets torch compile the decoder: a minute at the start, a fifth to a half faster afterwards.

    Raises:
        UsageError: there is no vocabulary, or prior and guide cannot be built.
    """
    if vocabulary is None:
        raise UsageError("The model has no vocabulary: set `model.vocabulary`, or give packed data.")
    network = decoder(vocabulary)
    if compile:
        network.compile()
    model: Any = joint(prior(cast(ThoughtShape, network.thought_shape)), network)
    return BuiltModel(model, guide(model), inference, evaluation)


def build_from_recipe(config: Namespace) -> BuiltModel:
    """Builds the model of a configuration, whose other keys are not read."""
    names = signature(build_model).parameters
    part = Namespace(model=Namespace({name: config.model[name] for name in names}))
    return build_model(**vars(_model_parser().instantiate(part).model))


def parse_model(recipe: str, source: object, trust: bool = False) -> Namespace:
    """The keys `model`, and ``data.directory``, ``score`` and ``observe``, of a run's recipe; others are left out.

    Nothing is imported but our own models and guides, unless the recipe is trusted or the user's own.

    Args:
        recipe: as `ltm_pyro.training.recipe.dump_recipe` wrote it.
        source: the run, for error messages.
        trust: lets the recipe name any code, which is listed first (see `ltm_pyro.training.trust`).

    Raises:
        UsageError: the recipe names code of others and is not trusted, a key has been renamed or is not known, or a
            class or file that the recipe names is missing.
    """
    try:
        content = load_yaml(recipe)
        refuse_old_keys(dotted_keys(content), source)
        model = {name: value for name, value in content["model"].items() if name not in TRAINING_KEYS}
        if folder := copies_beside(source):
            model = plugins.use_copies(model, folder)
        free = check_code({"model": model}, recipe, source, trust)
        data = {name: content["data"][name] for name in ("directory", "score", "observe") if name in content["data"]}
        data["directory"] = str(data["directory"])
        parser = _model_parser("stored recipe", load_yaml)  # what may be imported is, by now
        if not free:
            check_plain({"model": model, "data": data}, sections(parser), source)
        model = plugins.resolve(model, "model", known_class)
        config = parser.parse_object({"model": model, "data": data})
        check_classes(_parts(config), source, free)
        return config
    except ArgumentError as error:
        raise UsageError(complaint(str(error))) from None
    except UsageError:
        raise
    except (YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UsageError(f"The recipe of {source} cannot be read ({problem}): give a run that is whole.") from None


def check_parts(config: Namespace, source: object = "the recipe") -> None:
    """Refuses a configuration in which a part of the model is a function, of which a run could not be loaded again."""
    check_classes(_parts(config), source, free=True)


def _parts(config: Namespace) -> dict[str, Any]:
    values = ((name, config.model[name]) for name in plugins.PARTS)
    return {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in values}


def _model_parser(mode: str = "recipe", loader: Callable[[str], Any] | None = None) -> ArgumentParser:
    set_loader(mode, loader or load_recipe, exceptions=(YAMLError,))
    parser = ArgumentParser(exit_on_error=False, parser_mode=mode)
    parser.add_function_arguments(build_model, "model")
    parser.add_argument("--data.directory", type=str)
    parser.add_argument("--data.score", type=Scored, default="all")
    parser.add_argument("--data.observe", type=Observed, default="all")
    parser.set_defaults(DEFAULTS)
    return parser


def sections(parser: ArgumentParser) -> list[str]:
    """The keys of a parser whose values are mappings; for a text there it would open the file of that name."""
    return [action.dest for action in parser._actions if isinstance(action, _ActionConfigLoad)]


def load_recipe(text: str) -> Any:
    """YAML in which every ``file.py:Name`` that stands for a class is imported; `UsageError` for old keys."""
    content = plugins.load(text)
    refuse_old_keys(dotted_keys(content))
    return content


def read_model_recipe(file: str, trust: bool = False) -> Namespace:
    """`parse_model` of a recipe's file; `UsageError` if it cannot be read."""
    try:
        if Path(file).exists() and not Path(file).is_file():  # a device may have no end
            raise ValueError("no file")
        text = Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"The recipe {file} cannot be read as text ({error}); give a YAML file in UTF-8.") from None
    return parse_model(text, file, trust)


def complaint(message: str) -> str:
    """jsonargparse's message in one sentence: the key, its value, and what was expected there."""
    message = " ".join(message.split())
    found = re.fullmatch(
        r'(?:Parser key "(?P<key>[^"]*)": )?(?P<problem>.*?)(?:\.? (?:Got|Given) value: (?P<value>.*))?', message
    )
    key, problem, value = found.group("key", "problem", "value") if found else (None, message, None)
    problem = problem.rsplit(" expects a function or a callable class: ", 1)[-1]
    if expected := re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", problem):
        problem = f"expected {' or '.join(dict.fromkeys(a or b for a, b in expected))}"
    value = value and (value if len(value) <= 200 else f"{value[:200]}…")
    place = f"{key} = {value}: " if key and value else f"{key}: " if key else ""
    return f"{place}{problem.rstrip('.')}; `ltm fit --help` lists every key and its values."
