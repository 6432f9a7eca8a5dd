"""What somebody else's recipe may say, and commands on it under an audit hook (`tests/cli/audited.py`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
EVIL = """
import pathlib, traceback
pathlib.Path(__file__).with_name('pwned').write_text(f'HOSTILE_PAYLOAD {__file__} {"".join(traceback.format_stack())}')
"""
PRIOR = f"{EVIL}from pyro.nn import PyroModule\nclass Prior(PyroModule):\n    def __init__(self, shape): ...\n"
MISSING = ("triton", "xformers", "lm_eval", "tensorboardX", "cupy", "IPython", "evil")  # modules that others may bring


def audited(cases, folder):
    """The results of the cases, run one after the other in a process of their own."""
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {"TMPDIR": folder / "tmp", "HOME": folder / "home", "XDG_DATA_HOME": folder / "home" / "data"}
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "tests" / "cli" / "audited.py", folder / "cases.json", folder / "results.json"],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def assert_harmless(results, home, codes=(2,)):
    bad = [
        (x["name"], x["code"], x["noted"][:3], x["out"][-200:], x["err"][-500:])
        for x in results
        if x["noted"] or x["code"] not in codes or "Traceback (most recent call last)" in x["err"]
    ]
    assert not bad, f"{len(bad)} of {len(results)}: {json.dumps(bad[:8], indent=1)}"
    assert not [file.read_text()[-3000:] for file in home.rglob("pwned")]


def with_recipe(export, name, change):
    """A copy of an export with another recipe; ``change`` gets its content and may return a text instead."""
    folder = export.with_name(name)
    shutil.copytree(export, folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    text = change(content)
    (folder / "config.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(content))
    return folder


def part(key, value):
    """Sets a part of the model."""
    return lambda recipe: recipe["model"].update({key: value})


def called(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def as_text(key, value):
    """A part of the model in YAML that no parser of YAML would write."""
    return lambda recipe: f"{yaml.safe_dump({**recipe, 'model': {**recipe['model'], key: 'HERE'}})}".replace(
        "HERE", value
    )


SHELL = called("os.system", command="touch pwned")
MODELS = {  # what is in the model part of a recipe: never built
    "a function of Python's as prior": part("prior", called("subprocess.getoutput", cmd="touch pwned")),
    "a function as decoder": part("decoder", SHELL),
    "a function as joint": part("joint", called("timeit.timeit", stmt="open('pwned', 'w')")),
    "a function as guide": part("guide", called("pydoc.pipepager", text="x", cmd="touch pwned")),
    "a function by name alone": part("prior", "os.system"),
    "torch.load": part("decoder", called("torch.load", f="x.pt", weights_only=False)),
    "torch.hub.load": part("decoder", called("torch.hub.load", repo_or_dir="a/b", model="c")),
    "a class of torch": part("decoder", called("torch.nn.Linear", in_features=1, out_features=1)),
    "a class of Pyro by its short name": part("prior", called("PyroLinear", in_features=1, out_features=1)),
    "a class of ours that is not exported": part("decoder", called("ltm_pyro.models.block.Block", width=8)),
    "a function of ours": part("prior", called("ltm_pyro.runs.load.load_run", path="x")),
    "a module beside it": part("prior", called("evil.Prior")),
    "a file beside it": part("prior", called("evil.py:Prior")),
    "a file beside it by name alone": part("guide", "evil.py:Prior"),
    "a class inside init_args": part("prior", called("ltm_pyro.models.GaussianPrior", shape=SHELL)),
    "a class inside a list": part("decoder", called("ltm_pyro.models.Decoder", thought_layers=[SHELL])),
    "as vocabulary": part("vocabulary", SHELL),
    "as inference": part("inference", SHELL),
    "inside inference": part("evaluation", {"steps": SHELL}),
    "as compile": part("compile", SHELL),
    "YAML in a text": part("prior", "{class_path: os.system, init_args: {command: touch pwned}}"),
    "YAML in a text in a text": part("prior", "'{class_path: os.system, init_args: {command: touch pwned}}'"),
    "a key with a dot": part("prior.class_path", "os.system"),
    "arguments outside the signature": part("prior", called("ltm_pyro.models.GaussianPrior", colour="red")),
    "dict_kwargs": part("guide", {"class_path": "ltm_pyro.guides.MeanField", "dict_kwargs": {"colour": "red"}}),
    "a tag of Python": as_text("prior", "!!python/object/apply:os.system ['touch pwned']"),
    "letters that look alike": part("prior", called("ltm_pyro.models.Gauss\u0456anPrior")),
    "a long name": part("prior", called("a." * 5000 + "b")),
    "escape sequences": part("prior", called("evil.\x1b[31mPrior")),
    "no class": part("prior", called("ltm_pyro.models.gaussian.pyro")),
    "inference in a file": part("inference", "./inner.yaml"),
    "evaluation in a file": part("evaluation", "../inner.yaml"),
    "a part of inference in a file": part("inference", {"init": "inner.yaml"}),
    "a key with a dot and a file": part("inference.init", "inner.yaml"),
    "the whole model in a file": lambda recipe: recipe.update(model="inner.yaml"),
    "YAML as data": lambda recipe: recipe["data"].update(directory="{class_path: evil.py:Prior}"),
    "YAML as what is scored": lambda recipe: recipe["data"].update(score="{class_path: evil.py:Prior}"),
    "YAML as what is observed": lambda recipe: recipe["data"].update(observe="[{class_path: evil.py:Prior}]"),
    "the data in a file": lambda recipe: recipe.update(data="inner.yaml"),
    "a prior as guide": part("guide", called("ltm_pyro.models.GaussianPrior")),
}
TRAINER = {  # what is elsewhere: not read to load a model, and refused to train
    "callbacks": lambda recipe: recipe["trainer"].update(callbacks=[called("evil.Prior")]),
    "a callback that calls": lambda recipe: recipe["trainer"].update(
        callbacks=[called("pytorch_lightning.callbacks.LambdaCallback", setup="os.system")]
    ),
    "a logger": lambda recipe: recipe["trainer"].update(logger=called("evil.py:Prior")),
    "a profiler": lambda recipe: recipe["trainer"].update(profiler=SHELL),
    "a strategy": lambda recipe: recipe["trainer"].update(strategy=called("evil.Prior")),
    "the trainer in a file": lambda recipe: recipe.update(trainer="inner.yaml"),
    "the checkpoints in a file": lambda recipe: recipe.update(checkpoints="./inner.yaml"),
    "another recipe": lambda recipe: recipe.update(config="./inner.yaml"),
    "YAML as run": lambda recipe: recipe.update(run="{class_path: evil.py:Prior}"),
    "YAML as warm start": lambda recipe: recipe.update(warm_start="{class_path: evil.py:Prior}"),
    "YAML as cache": lambda recipe: recipe["data"].update(cache="{class_path: evil.py:Prior}"),
}
PLACES = {  # names of files where no class is expected: only names
    "run": lambda recipe: recipe.update(run="evil.py:Prior"),
    "data": lambda recipe: recipe["data"].update(directory="evil.py:Prior"),
    "an address": lambda recipe: recipe["data"].update(directory="http://127.0.0.1:9/pack"),
    "a chain": lambda recipe: recipe["data"].update(directory="simplecache::http://127.0.0.1:9/pack"),
    "a program": lambda recipe: recipe["data"].update(directory="pipe:touch pwned"),
    "another folder": lambda recipe: recipe["data"].update(directory=str(ROOT.parent / "outside")),
    "a folder above": lambda recipe: recipe["data"].update(directory="../../outside"),
}
