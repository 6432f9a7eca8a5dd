"""Recipes: from a YAML file and command-line options to module, data and Lightning trainer."""

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, cast, get_args

import pytorch_lightning as pl
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from pytorch_lightning.callbacks import Checkpoint, Timer
from yaml import YAMLError

from ltm_pyro.data.manifest import is_pack, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.training import model_config, plugins
from ltm_pyro.training.callbacks import check_callbacks
from ltm_pyro.training.checkpoints import LocalFile, Saving
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.training.metrics import COLUMNS
from ltm_pyro.training.model_config import check_parts, complaint, load_recipe
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.old_recipe_keys import option_keys, option_values, refuse_old_keys
from ltm_pyro.training.run_directory import CHECKPOINT, METRICS, RECIPE, TOKENIZER, WEIGHTS
from ltm_pyro.training.trust import check_code, check_plain, of_code, source_lines
from ltm_pyro.utils.files import local_path
from ltm_pyro.utils.limits import LARGEST_SEED
from ltm_pyro.utils.safe_yaml import load_yaml

DEFAULTS = {
    **model_config.DEFAULTS,
    "trainer.check_val_every_n_epoch": None,  # validation counts steps, not passes over the data
    "trainer.val_check_interval": 1000,
    "trainer.log_every_n_steps": 10,
    "trainer.max_epochs": -1,
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "32", "64", "bf16")
PATHS = (
    ("", "run"),
    ("", "ckpt_path"),
    ("", "warm_start"),
    ("data", "directory"),
    ("data", "cache"),
    ("model", "keep_local"),
)
DECIDING = ("seed_everything", "trainer.limit_train_batches")  # which sequences come next
WITHOUT_EFFECT = (  # on what a training computes
    *("run", "force", "ckpt_path", "config", "warm_start", "checkpoints", "data.workers", "data.cache"),
    *("trainer.log_every_n_steps", "trainer.logger", "trainer.profiler"),
)
OF_A_LAUNCHER = ("MASTER_ADDR", "NODE_RANK", "SLURM_NTASKS", "PMI_SIZE", "LSB_JOBID", "KUBERNETES_PORT")
FIXED: dict[str, Any] = {  # settings of Lightning's trainer that no recipe may change
    "use_distributed_sampler": False,  # `Order` shares sequences out
    "enable_progress_bar": False,  # `Progress` has one
    "enable_model_summary": False,  # `cost_summary` is one
    "inference_mode": False,  # because validation fits q, which needs gradients
    "num_sanity_val_steps": 0,
}


def recipe_parser() -> ArgumentParser:
    """The keys of a recipe: model, data, trainer, and where the run goes."""
    usage = "ltm fit --config FILE [--KEY VALUE ...]"
    about = (
        "Train a Latent-Thought Language Model. Every key of a recipe is an option, and an option overrides the recipe."
    )
    set_loader("recipe", load_recipe, exceptions=(YAMLError,))
    parser = ArgumentParser(
        prog="ltm fit",
        usage=usage,
        description=about,
        exit_on_error=False,
        parser_mode="recipe",
        allow_abbrev=False,  # or an option would not be what `_check_stored` takes it for
    )
    parser.add_argument("--config", action="config", help="a recipe (YAML)")
    parser.add_argument("--run", type=str, default="runs/ltm", help="the run directory that is written")
    parser.add_argument("--force", action="store_true", help="replace an existing run directory")
    about = "import and execute what the recipe of a run or an export names; lists it first"
    parser.add_argument("--trust", action="store_true", help=about)
    resume = "resume from this checkpoint; `last` is the run's own, if there is one already"
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=resume)
    parser.add_argument("--checkpoints", type=Saving, default=Saving(), help="how often the training is saved")
    parser.add_argument("--warm_start", type=str | None, default=None, help="begin from a run without thoughts (K = 0)")
    parser.add_argument("--seed_everything", type=int, default=0, help="random seed of weights, order and noise")
    parser.add_class_arguments(LTMModule, "model")
    parser.add_class_arguments(PackedData, "data")
    for target in ("model.seed", "data.seed"):
        parser.link_arguments("seed_everything", target)
    parser.add_class_arguments(
        pl.Trainer, "trainer", skip={*FIXED, "default_root_dir", "enable_checkpointing"}, instantiate=False
    )
    for action in parser._actions:  # or `1` is read as 1.0, which means all batches to Lightning, not one of them
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            cast(Any, action)._typehint = Union[tuple(sorted(kinds, key=lambda kind: kind is not int))]  # noqa: UP007
    parser.set_defaults(DEFAULTS)
    return parser


def read_recipe(arguments: list[str], own: bool = True) -> Namespace:
    """The options as one configuration.

    What the user writes may name any class: options, and recipes of the user's own. A recipe that is stored with a run
    or an export may come from anybody, and so may name only known classes unless the user has trained it here, or
    ``--trust`` is among the options (see `ltm_pyro.training.trust`).

    Args:
        arguments: of `ltm fit`.
        own: False if recipes and options are not the user's, but from a database or a file.

    Raises:
        UsageError: a key is wrong, which is named, or code of others is named without trust.
    """
    recipe = " ".join(re.findall(r"--config[ =](\S+)", " ".join(arguments)))
    try:
        refuse_old_keys(option_keys(arguments))
        _check_stored(arguments, own)
        config = recipe_parser().parse_args(plugins.resolve_arguments(arguments))
        check_parts(config)
        return _expand_paths(config, arguments)
    except ArgumentError as error:
        named = str(error).replace("Problems parsing config", f"The recipe {recipe} cannot be parsed", 1)
        raise UsageError(complaint(named)) from None
    except UsageError:
        raise
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"The recipe {recipe} cannot be read as text ({error}); give a YAML file in UTF-8.") from None
    except ValueError as error:  # such as a number of 5,000 digits
        raise UsageError(f"The recipe and its options cannot be read: {complaint(str(error))[:400]}") from None


def _expand_paths(config: Namespace, arguments: list[str]) -> Namespace:
    """Paths with the user's home written out; and a run's own recipe means the run that it is in, wherever that is."""
    given = map(Path, re.findall(r"(?:^|\0)--config[=\0]([^\0]+)", "\0".join(arguments)))
    files = [path for path in given if os.path.isfile(path)]  # a recipe can also be given as text
    recipes = [path for path in files if "run" in dict(_leaves(load_yaml(path.read_text("utf-8"))))]
    if recipes and not any(re.match(r"--run(=|$)", word) for word in arguments):  # the last recipe names the run
        name, folder = recipes[-1].name, recipes[-1].parent
        if name == RECIPE and (folder / TOKENIZER).is_file() and (folder / CHECKPOINT).parent.is_dir():
            config.run = str(folder)
    local_path(config.run, "--run")  # to refuse a bad name now
    for part, name in PATHS:
        section = config[part] if part else config
        if section[name] is not None and str(section[name]).startswith("~"):
            section[name] = str(local_path(section[name], f"--{part}.{name}".replace("-.", "-")))
    return config


def changed_settings(earlier: str, now: str, source: object) -> list[str]:
    """What a resumed training has set otherwise than the recipe in its checkpoint, as ``key old → new``.

    Raises `UsageError` for a setting that decides which sequences come next: with another, some would come twice and
    others never.
    """
    before, after = (dict(_leaves(load_yaml(text))) for text in (earlier, now))
    changed = [key for key in after if key in before and before[key] != after[key]]
    for key in DECIDING:
        if key in changed:
            raise UsageError(
                f"{source} was trained with `{key}` {before[key]}, but now it is {after[key]}, and some sequences "
                f"would come twice, others never: resume with {before[key]}, or begin a new run."
            )
    free = tuple(f"{key}." for key in WITHOUT_EFFECT)
    return [f"{key} {before[key]} → {after[key]}" for key in changed if not f"{key}.".startswith(free)]


def _leaves(content: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted key."""
    if not isinstance(content, Mapping):
        yield above.removesuffix("."), content
        return
    for key, value in content.items():
        yield from _leaves(value, f"{above}{key}.")


def _check_stored(arguments: list[str], own: bool) -> None:
    """Refuses code of others in recipes that are not the user's own, and in options that are not."""
    trust = "--trust" in arguments
    unchecked: list[tuple[Any, str]] = []
    for key, value in option_values(arguments):
        if not value:
            continue
        file = Path(os.path.expanduser(value))
        if key == "config" and (not own or (os.path.isfile(file) and is_stored(file))):
            try:
                text = file.read_text("utf-8")
                content = load_yaml(text)
            except (OSError, ValueError, YAMLError):  # which the parser says better
                continue
            if not check_code(of_code(content), text, value, trust):
                unchecked.append((content, value))
        elif not own and not check_code(of_code({key: value}), "", f"the option --{key}", trust) and key != "config":
            unchecked.append(({key: value}, "the options"))
    sections = model_config.sections(recipe_parser()) if unchecked else []
    for content, source in unchecked:
        check_plain(content, sections, source)


def is_stored(recipe: Path) -> bool:
    """Whether a recipe lies in the folder of a run or of an export, or is a link into one."""
    folders = (recipe.absolute().parent, recipe.resolve().parent)
    return any((folder / name).exists() for folder in folders for name in (CHECKPOINT.parent, METRICS, WEIGHTS))


def check_budget(config: Namespace) -> None:
    """Refuses a training without a step, and one without an end, of which no schedule can compute the progress."""
    trainer = config.trainer
    budgets = {
        "trainer.max_steps": (trainer.max_steps, (None, -1)),  # -1 means no limit in Lightning
        "trainer.max_epochs": (trainer.max_epochs, (None, -1)),
        "model.max_flops": (config.model.max_flops, (None,)),
    }
    given = {name: value for name, (value, unlimited) in budgets.items() if value not in unlimited}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise UsageError(f"`{name}` is {value}, no budget to train for: give a number above 0, or leave it out.")
        if name != "model.max_flops" and value >= 2**31:
            raise UsageError(f"`{name}` is {value}, more than can be counted: give at most {2**31 - 1}.")
    if not given and trainer.max_time is None:
        raise UsageError(
            "The training has no end: set `trainer.max_time` (DD:HH:MM:SS), `trainer.max_steps`, `trainer.max_epochs` "
            "or `model.max_flops` to more than 0."
        )
    for name in ("limit_train_batches", "accumulate_grad_batches"):
        if (value := trainer[name]) is not None and not value > 0:
            raise UsageError(f"`trainer.{name}` is {value}, which leaves no batch to train on: leave it out.")


def check_seed(config: Namespace) -> None:
    """Refuses a random seed that NumPy does not take."""
    if not 0 <= config.seed_everything <= LARGEST_SEED:
        raise UsageError(f"`seed_everything` is {config.seed_everything}: choose a seed from 0 to {LARGEST_SEED}.")


def take_vocabulary(config: Namespace) -> None:
    """Fills in the vocabulary of the packed data if the recipe gives none."""
    if config.model.vocabulary is None:
        if not is_pack(config.data.directory):
            raise UsageError(
                f"The recipe gives no vocabulary, and there is no pack at {config.data.directory} to take one from: "
                f"add `model.vocabulary` to the recipe."
            )
        config.model.vocabulary = read_manifest(config.data.directory).vocabulary


def check_data(config: Namespace) -> None:
    """Refuses data that the recipe cannot be trained on, and fills in their vocabulary.

    Refused are another vocabulary than the recipe's, sequences that are too long, a missing split, and a slow gradient
    that needs q to see what is scored.
    """
    manifest = read_manifest(config.data.directory)
    manifest.split("train", config.data.directory)
    vocabulary, length = config.model.vocabulary, config.model.decoder.init_args.get("length")
    if vocabulary not in (None, manifest.vocabulary):
        raise UsageError(
            f"The recipe's vocabulary is {vocabulary}, but {config.data.directory} was packed with "
            f"{manifest.vocabulary} entries: set `model.vocabulary` to {manifest.vocabulary}, or pack the data again."
        )
    if length is not None and manifest.seq_len > length:
        raise UsageError(
            f"The data's sequences have {manifest.seq_len} tokens, but `model.decoder.length` is {length}: "
            f"raise it, or pack with --seq-len {length}."
        )
    if config.model.inference.slow_gradient == "trajectory":
        for name in ("score", "observe"):
            if config.data[name] != "all":
                raise UsageError(
                    f"With `data.{name}: {config.data[name]}` q may see other tokens than are scored, and the fast "
                    f"steps' loss is then not the slow step's: set `model.inference.slow_gradient` to last."
                )
    if "val" not in manifest.splits and config.trainer.limit_val_batches != 0:
        raise UsageError(
            f"{config.data.directory} holds out no documents: pack it with a --val-fraction above 0, or set "
            f"`trainer.limit_val_batches` to 0."
        )
    config.model.vocabulary = manifest.vocabulary


def build_module(config: Namespace) -> LTMModule:
    """The Lightning module of a configuration, without data and trainer."""
    return _instantiate(config).model


def _instantiate(config: Namespace) -> Namespace:
    try:
        return recipe_parser().instantiate(config)
    except UsageError:
        raise
    except ValueError as error:
        if "Does not validate" not in str(error):  # what a class of the user's raises keeps its traceback
            raise
        raise UsageError(f"The recipe has a wrong value: {complaint(str(error))[:400]}") from None


def build(config: Namespace, **trainer: Any) -> tuple[LTMModule, PackedData, pl.Trainer]:
    """Module, data and trainer; ``trainer`` adds to the recipe's own settings."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips would hide the table of costs
    check_seed(config)
    pl.seed_everything(config.seed_everything, verbose=False)
    objects = _instantiate(config)
    settings = {**objects.trainer.as_dict(), **trainer}
    for name in ("callbacks", "logger"):
        settings[name] = [*_listed(objects.trainer[name]), *trainer.get(name, [])]
    validates = settings["limit_val_batches"] != 0
    left_out = [] if validates and missing_bound(objects.model.model, objects.model.guide) is None else ["val/bound"]
    left_out += [] if validates else ["val/kl"]
    figures = [name for name in COLUMNS[2:] if name not in left_out]
    check_callbacks(settings["callbacks"], figures, bool(_listed(objects.trainer["logger"])))
    return objects.model, objects.data, _trainer(settings, config.run)


def _listed(value: Any) -> list[Any]:
    return [] if value in (None, True, False) else value if isinstance(value, list) else [value]


def _check_trainer(settings: dict[str, Any]) -> None:
    if settings["fast_dev_run"] or settings["barebones"]:
        name = "fast_dev_run" if settings["fast_dev_run"] else "barebones"
        raise UsageError(f"`trainer.{name}` would leave out figures and checkpoints: set `trainer.max_steps` to a few.")
    strategy = settings["strategy"] if isinstance(settings["strategy"], str) else type(settings["strategy"]).__name__
    if not strategy.lower().startswith(("auto", "ddp", "single")):
        raise UsageError(
            f"`trainer.strategy` is {strategy}, but fast steps go backward inside the forward pass, which "
            f"does not work with sharded parameters: choose ddp, and lower data.batch_size if the model does not fit."
        )
    if settings["overfit_batches"]:  # not in `FIXED`, because the recipes of earlier runs have it as 0
        raise UsageError(
            f"`trainer.overfit_batches` is {settings['overfit_batches']}, which would replace the order in which data "
            f"are read: leave it out, and pack a few texts to overfit them."
        )
    if settings["num_nodes"] not in (1, "auto") and not any(name in os.environ for name in OF_A_LAUNCHER):
        raise UsageError(
            f"`trainer.num_nodes` is {settings['num_nodes']}, but nothing says where the other nodes are: start the "
            f"command by torchrun or srun on each of them, as docs/distributed.md shows, or leave it out."
        )
    if isinstance(devices := settings["devices"], str) and not devices.isascii():
        raise UsageError(f"`trainer.devices` is {devices!r}: write it in the digits 0 to 9.")
    if not 0 <= (settings["gradient_clip_val"] or 0) < math.inf:
        raise UsageError(f"`trainer.gradient_clip_val` is {settings['gradient_clip_val']}: give 0 or more.")
    if settings["val_check_interval"] == 0:
        raise UsageError("`trainer.val_check_interval` is 0: set `trainer.limit_val_batches` to 0 for no validation.")
    if str(settings["precision"] or "32-true") not in PRECISIONS:
        raise UsageError(
            f"`trainer.precision` is {settings['precision']}, but thoughts, KL and optimiser states need float32: "
            f"choose one of {', '.join(PRECISIONS)}."
        )


def _trainer(settings: dict[str, Any], run: str) -> pl.Trainer:
    _check_trainer(settings)
    try:
        ours = any(isinstance(callback, Checkpoint) for callback in settings["callbacks"])
        folder = local_path(run, "--run")
        settings["plugins"] = [*_listed(settings["plugins"]), *([LocalFile()] if ours else [])]
        trainer = pl.Trainer(**settings, **FIXED, enable_checkpointing=ours, default_root_dir=folder)
    except UsageError:
        raise
    except Exception as error:  # besides its own, what its libraries raise for a device that is not there
        raise UsageError(lightning_complaint(error)) from None
    times = [timer.time_remaining() for timer in cast(Any, trainer).callbacks if isinstance(timer, Timer)]
    if any(left is not None and left <= 0 for left in times):
        raise UsageError(f"`trainer.max_time` is {settings['max_time']}, no time to train: give at least one second.")
    return trainer


def lightning_complaint(error: Exception) -> str:
    """Lightning's complaint in one sentence."""
    return f"Lightning refuses the `trainer` settings: {' '.join(str(error).split())}"


def dump_recipe(config: Namespace) -> str:
    """The configuration as YAML, every default written out; last the SHA-256 of every file of others' that it names."""
    config = config.clone()
    config.ckpt_path, config.force, config.trust, config.config = None, False, False, None
    recipe = plugins.name_files(recipe_parser().dump(config, skip_unset=False, format="yaml"))
    return recipe + source_lines(recipe)
