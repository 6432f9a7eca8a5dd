"""Other people's artefacts: nothing that they name is imported, executed, fetched or read outside unless trusted.

Commands run under an audit hook (`tests/cli/audited.py`).
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from ltm_pyro.evaluation.documents import RECORDS
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.storage import open_storage
from tests.cli.hostile import EVIL, MODELS, PLACES, SHELL, TRAINER, assert_harmless, audited, called, part, with_recipe

ROOT = Path(__file__).resolve().parents[2]


def commands(export):
    """Every command that reads a run or a recipe, on one export."""
    folder, text = str(export), str(export.parent / "text.txt")
    recipe, out = str(export / "config.yaml"), str(export.parent / f"out of {export.name}")
    yield "load_run", {"load": folder}
    for argv in (
        ["show", folder, "--svg", f"{out}.svg"],
        ["show", recipe, "--svg", f"{out}.svg"],
        ["flops", "--config", recipe],
        ["evaluate", folder, "--data", text, "--samples", "2"],
        ["evaluate", folder, "--suite", "zero-shot", "--source", f"ptb={text}", "--out", out],
        ["generate", folder, "--max-new-tokens", "2"],
        ["posterior", folder, "--input", text, "--out", f"{out}.nc", "--longer", "cut", "--samples", "25"],
        ["calibrate", folder, "--simulations", "20", "--samples", "9"],
        ["check-prior", folder, "--data", text, "--samples", "2", "--picture", f"{out}.png"],
        ["check-prior", recipe, "--samples", "2"],
        ["generate", folder, "--rethink", "1", "--max-new-tokens", "2"],
        [
            "posterior",
            folder,
            "--input",
            text,
            "--out",
            f"{out}.zarr",
            "--longer",
            "cut",
            "--samples",
            "25",
            "--stream",
        ],
        ["context", "--config", recipe, "--out", f"{out} context"],
        ["fit", "--config", recipe, "--run", f"{out} run"],
        ["compare", "--config", recipe, "--out", f"{out} compare"],
        ["baselines", "--config", recipe, "--budget", "1e9flops", "--out", f"{out} baselines"],
        ["study", "run", "rate_ratio", "--base-config", recipe, "--storage", f"sqlite:///{out}.db", "--out", out],
    ):
        name = " ".join(argv[:2] if argv[0] == "study" else argv[:1])
        yield f"{name} of a recipe" if argv[:2] == ["check-prior", recipe] else name, {"argv": argv}


def cases_of(export, label):
    common = {"home": str(export.parent), "cwd": str(export)}
    return [{"name": f"{label}: {name}", **common, **case} for name, case in commands(export)]


def test_a_model_part_that_names_code_is_refused_by_every_command(exported, tmp_path):
    cases = []
    for number, (label, change) in enumerate(MODELS.items()):
        cases += cases_of(with_recipe(exported, f"model{number}", change), label)
    assert_harmless(audited(cases, tmp_path), exported.parent)


def test_a_stored_recipe_is_known_as_one_however_it_is_named(exported, tmp_path):
    """By the user's home, an abbreviated option, or an option of its own; and what names other files is refused."""
    home, cases = exported.parent, []
    hostile = with_recipe(exported, "hostile", part("prior", called("evil.py:Prior"))) / "config.yaml"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hostile").symlink_to(hostile.parent)
    words = [["--config=~/hostile/config.yaml"], ["--config", "~/hostile/config.yaml"], ["--conf", str(hostile)]]
    for number, name in enumerate(("the trainer in a file", "another recipe", "YAML as run", "YAML as cache")):
        words.append(["--config", str(with_recipe(exported, f"stored{number}", TRAINER[name]) / "config.yaml")])
    for given in words:
        cases.append({"name": str(given), "argv": ["fit", *given], "home": str(home), "cwd": str(hostile.parent)})
    results = audited(cases, tmp_path)
    assert_harmless(results, home)
    assert all("names code that is not ltm_pyro's: evil.py:Prior" in x["err"] for x in results[:2])


@pytest.mark.slow
def test_what_only_training_reads_is_not_built_to_load_a_model(exported, tmp_path):
    cases = []
    for number, (label, change) in enumerate(TRAINER.items()):
        cases += cases_of(with_recipe(exported, f"trainer{number}", change), label)
    training = ("fit", "compare", "baselines", "context", "study run", "check-prior of a recipe")
    results = audited(cases, tmp_path)
    assert_harmless([x for x in results if x["name"].endswith(training)], exported.parent)
    assert_harmless([x for x in results if not x["name"].endswith(training)], exported.parent, codes=(0,))


def test_names_of_files_stay_names_and_data_outside_are_not_touched(exported, tmp_path):
    cases = []
    for number, (label, change) in enumerate(PLACES.items()):
        export = with_recipe(exported, f"place{number}", change)
        common = {"home": str(exported.parent), "cwd": str(export)}
        cases += [{"name": f"{label}: load_run", "load": str(export), **common}]
        cases += [{"name": f"{label}: evaluate", "argv": ["evaluate", str(export), "--limit", "2"], **common}]
        suite = ["evaluate", str(export), "--suite", "reconstruction", "--out", str(export / "suites")]
        cases += [{"name": f"{label}: suite", "argv": suite, **common}]
        flops = export / "bare.yaml"
        content = yaml.safe_load((export / "config.yaml").read_text())
        content["model"]["vocabulary"] = None
        flops.write_text(yaml.safe_dump(content))
        cases += [{"name": f"{label}: flops", "argv": ["flops", "--config", str(flops)], **common}]
    results = audited(cases, tmp_path)
    assert_harmless([x for x in results if x["name"].endswith("load_run")], exported.parent, codes=(0,))
    assert_harmless([x for x in results if not x["name"].endswith("load_run")], exported.parent)


def test_a_checkpoint_with_a_hostile_recipe_is_refused(run, tmp_path):
    home = tmp_path / "theirs"
    shutil.copytree(run, home / "run")
    file = home / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    recipe = yaml.safe_load(content["ltm_pyro"]["recipe"])
    recipe["model"]["prior"] = SHELL
    content["ltm_pyro"]["recipe"] = yaml.safe_dump(recipe)
    torch.save(content, file)
    (home / "run" / "config.yaml").write_text(yaml.safe_dump(recipe))
    (home / "text.txt").write_text("every small model reads of people")
    cases = cases_of(home / "run", "checkpoint")
    cases[0]["load"] = str(file)
    export = ["export", str(home / "run"), "--out", str(home / "out")]
    cases += [{"name": "export", "argv": export, "home": str(home), "cwd": str(home)}]
    assert_harmless(audited(cases, tmp_path), home)


def hostile_posteriors(posterior, folder, secret):
    """Files that name a run, or that have a part in another file."""
    made = {}
    for kind in ("external link", "external storage", "virtual", "deep"):
        made[kind] = folder / f"{kind}.nc"
        shutil.copy(posterior, made[kind])
        with h5py.File(made[kind], "a") as file:
            if kind == "external link":
                file["stolen"] = h5py.ExternalLink(str(secret), "/group")
            elif kind == "external storage":
                size = secret.stat().st_size // 8
                file.create_dataset("stolen", (size,), "f8", external=[(str(secret), 0, 8 * size)])
            elif kind == "virtual":
                layout = h5py.VirtualLayout((4,), "f8")
                layout[:] = h5py.VirtualSource(str(secret), "group/z", (4,))
                file.create_virtual_dataset("stolen", layout)
            else:
                group = file
                for _ in range(2000):
                    group = group.create_group("g")
                group["stolen"] = h5py.ExternalLink(str(secret), "/group")
    return made


def test_a_posterior_takes_nothing_from_other_files_and_loads_no_run(run, exported, ltm, tmp_path):
    home, secret = exported.parent, tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["group/z"] = np.full(4, 271828.0)
    options = ("--input", home / "text.txt", "--longer", "cut", "--samples", 30)
    for name in ("sound.nc", "sound.zarr"):
        code, _, err = ltm("posterior", run, "--out", home / name, *options)
        assert code == 0, err
    hostile = with_recipe(exported, "named", MODELS["a module beside it"])
    names_run = home / "names a run.nc"
    shutil.copy(home / "sound.nc", names_run)
    with h5py.File(names_run, "a") as file:
        file.attrs["run"] = str(hostile)
    linked = home / "linked.zarr"
    shutil.copytree(home / "sound.zarr", linked)
    chunk = next(x for x in linked.rglob("*") if x.is_file() and x.name.isdigit())
    chunk.unlink()
    chunk.symlink_to(secret)
    pickled = home / "pickled.zarr"
    pickled.mkdir()
    (pickled / ".zgroup").write_text('{"zarr_format": 2}')
    (pickled / ".zattrs").write_text('{"ltm_pyro_posterior": 1}')
    (pickled / "z").mkdir()
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": {"id": "pickle"}}
    array |= {"fill_value": 0, "order": "C", "filters": [{"id": "vlen-utf8"}]}
    (pickled / "z" / ".zarray").write_text(json.dumps(array))
    (pickled / "z" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["x"]}')
    (pickled / "z" / "0").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    files = {**hostile_posteriors(home / "sound.nc", home, secret), "symlink": linked, "pickle": pickled}
    common = {"home": str(home), "cwd": str(home)}
    refused = [
        {"name": kind, "argv": ["report", str(file), "--out", str(home / f"{kind}.html")], **common}
        for kind, file in files.items()
    ]
    refused += [{"name": "run", "argv": ["report", str(names_run), "--run", str(hostile), "--out", "x.html"], **common}]
    named = [{"name": "named", "argv": ["report", str(names_run), "--out", str(home / "named.html")], **common}]
    results = audited(refused + named, tmp_path)
    assert_harmless(results[:-1], home)
    assert_harmless(results[-1:], home, codes=(0,))
    assert "names the run" in results[-1]["err"]
    assert not list(home.glob("*link*.html"))


def test_a_pack_and_a_tokenizer_are_only_data(exported, packed, tmp_path):
    home = exported.parent
    cases, common = [], {"home": str(home), "cwd": str(home)}
    for number, file in enumerate(("../secret.tar", "/etc/passwd", "pipe:touch pwned", "http://127.0.0.1:9/x.tar")):
        pack = home / f"pack{number}"
        shutil.copytree(packed, pack)
        manifest = json.loads((pack / "manifest.json").read_text())
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                shard["file"] = file
        (pack / "manifest.json").write_text(json.dumps(manifest))
        for argv in (["data", "verify"], ["data", "show"], ["evaluate", str(exported), "--data"]):
            cases.append({"name": f"{file}: {argv[0]}", "argv": [*argv, str(pack)], **common})
    for number, change in enumerate(
        (
            {"model": {"type": "BPE", "vocab": "/etc/passwd", "merges": "/etc/passwd"}},
            {"pre_tokenizer": {"type": "Custom", "class_path": "os.system"}},
            {"class_path": "os.system", "auto_map": {"AutoTokenizer": "evil.Prior"}, "decoder": None},
        )
    ):
        folder = exported.with_name(f"tokenizer{number}")
        shutil.copytree(exported, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | change))
        cases.append(
            {"name": f"tokenizer {number}", "argv": ["generate", str(folder), "--max-new-tokens", "2"], **common}
        )
    assert_harmless(audited(cases, tmp_path), home)


def hostile_study(url, source, recipe, settings, run):
    """A storage with one complete trial, as somebody else would have written it."""
    with open_storage(url) as storage:
        plan = Plan(study="theirs", question="?", space={}, recipe=recipe, budget="1s", at_most={})
        study = trials.open_study(storage, "theirs", plan)
        trials.open_study(storage, "theirs" + trials.CHECKS, plan)
        study.set_user_attr(trials.SOURCE, source)
        trials.enqueue(study, [{}])
        trial = trials.claim(study, lambda: trials.current_trials(study), trials.plan_of(study))
        trial.set_user_attr(trials.SETTINGS, settings)
        trial.set_user_attr(trials.SEED, 0)
        trial.set_user_attr(trials.RUN, run)
        trials.finish(study, trial, {"bound": 1.0}, trials.plan_of(study))


def test_a_study_in_a_database_is_only_data(exported, tmp_path):
    home = exported.parent
    recipe = (exported / "config.yaml").read_text()
    content = yaml.safe_load(recipe)
    content["model"]["prior"] = called("evil.Prior")
    callback = yaml.safe_load(recipe)
    callback["trainer"]["callbacks"] = [called("evil.Prior")]
    (home / "study.py").write_text(f"{EVIL}space = {{}}")
    secret, runs = tmp_path / "secret" / "trial-0000", home / "runs" / "studies" / "theirs"
    secret.mkdir(parents=True)
    (secret / RECORDS).write_text("[]")
    (secret / "study.py").write_text("space = {}")
    (runs / "trial-0001").mkdir(parents=True)
    (runs / "trial-0001" / RECORDS).symlink_to(secret / RECORDS)
    (runs / "trial-0002").symlink_to(secret)
    named = [str(secret), str(runs / "trial-0001"), "trial-0002", f"{runs}/../../../../secret/trial-0000", 7, "\0"]
    studies = {  # name -> the study's file, its recipe, its settings, and whether its best is refused
        "file": (str(home / "study.py"), recipe, {}, False),
        "prior": ("rate_ratio", yaml.safe_dump(content), {}, True),
        "callback": ("rate_ratio", yaml.safe_dump(callback), {}, True),
        "settings": ("rate_ratio", recipe, {"model.prior": "evil.Prior"}, True),
        "shell": ("rate_ratio", recipe, {"model.prior": {**SHELL}}, True),
        "file elsewhere": (str(secret / "study.py"), recipe, {}, False),
    }
    shown, refused = [], []
    for run, (name, (source, text, settings, bad)) in zip(named, studies.items(), strict=True):
        url = f"sqlite:///{home / name}.db"
        hostile_study(url, source, text, settings, run)
        common = {"home": str(home), "cwd": str(home)}
        for argv in (["list"], ["show"], ["report", "--out", str(home / f"{name} report")]):
            shown.append({"name": f"{name}: {argv[0]}", "argv": ["study", *argv, "--storage", url], **common})
        best = ["study", "best", "--storage", url, "--out", str(home / f"{name}.yaml")]
        (refused if bad else shown).append({"name": f"{name}: best", "argv": best, **common})
    results = audited([*shown, *refused], tmp_path)
    assert_harmless(results[: len(shown)], home, codes=(0,))
    assert_harmless(results[len(shown) :], home)
    said = next(x["out"] for x in results if x["name"] == "file: report")
    assert "own analysis is left out, because it is code in" in said


def test_trust_lists_what_it_imports_and_then_does(exported, tmp_path):
    home = exported.parent
    (home / "theirs.py").write_text((ROOT / "examples" / "my_prior.py").read_text())
    folder = with_recipe(exported, "trusted", part("prior", called(f"{home / 'theirs.py'}:SpikeAndSlab")))
    text = (folder / "config.yaml").read_text()
    common = {"home": str(home), "cwd": str(home)}
    show = ["show", str(folder / "config.yaml"), "--svg", str(home / "x.svg")]
    cases = [{"name": "no", "argv": show, **common}, {"name": "yes", "argv": [*show, "--trust"], **common}]
    for name, digest in (("same", _sha256(home / "theirs.py")), ("other", "0" * 64)):
        (folder / f"{name}.yaml").write_text(f"{text}# sha256 of {home / 'theirs.py'}: {digest}\n")
        cases.append(
            {"name": name, "argv": ["show", str(folder / f"{name}.yaml"), *show[2:], "--force", "--trust"], **common}
        )
    no, yes, same, other = audited(cases, tmp_path)
    assert_harmless([no], home)
    assert "SpikeAndSlab" in no["err"]
    assert yes["code"] == 0, yes["err"]
    first = yes["err"].splitlines()[1]
    assert f"{home / 'theirs.py'}, SHA-256 {_sha256(home / 'theirs.py')}, not noted since training" in first
    assert f"executes {home / 'theirs.py'}" in yes["noted"]
    assert "unchanged since training" in same["err"]
    assert "CHANGED since training" in other["err"]


def _sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


FITTING = """
import inspect, json, sys, typing
import torch, pyro, pytorch_lightning, transformers, optuna, sklearn, fsspec, datasets, tokenizers  # noqa
from torch import nn
names = []
for module in [*sys.modules.values()]:
    for name, x in [*getattr(module, "__dict__", {}).items()]:
        own = getattr(x, "__module__", None) == getattr(module, "__name__", "")
        if not own or name.startswith("__") or getattr(module, "__name__", "").startswith("ltm_pyro"):
            continue
        try:
            if inspect.isclass(x):
                fits = issubclass(x, nn.Module) or callable(getattr(x, "__call__", None))
            else:
                found = inspect.signature(x).return_annotation if inspect.isfunction(x) else None
                fits = callable(x) and (found in (None, inspect.Signature.empty, typing.Any) or "Module" in str(found))
        except Exception:
            fits = callable(x)
        if fits:
            names.append(f"{module.__name__}.{name}")
print(json.dumps(sorted(set(names))))
"""


@pytest.mark.parametrize("count", [20, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_importable_callable_is_called(exported, tmp_path, count):
    found = subprocess.run([sys.executable, "-P", "-c", FITTING], capture_output=True, text=True, check=True)
    names = json.loads(found.stdout)
    assert len(names) > 5000
    cases, parts = [], ("decoder", "prior", "joint", "guide")
    for number, name in enumerate(random.Random(0).sample(names, count)):
        value = (called(name), name, called(name, command="touch pwned"))[number % 3]
        folder = exported.with_name("callable") / str(number)
        folder.mkdir(parents=True)
        for file in exported.iterdir():
            (folder / file.name).symlink_to(file) if file.name != "config.yaml" else None
        content = yaml.safe_load((exported / "config.yaml").read_text())
        content["model"][parts[number % 4]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        cases.append({"name": name, "load": str(folder), "home": str(exported.parent), "cwd": str(folder)})
    results = audited(cases, tmp_path)
    assert_harmless(results, exported.parent)
    assert all("names code that is not ltm_pyro's" in result["err"] for result in results)
