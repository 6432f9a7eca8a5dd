"""User errors: one sentence with the value and the way out, exit code 2, no file lost and none left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ltm_pyro.data.tokenizer import number_tokenizer

CONTENT = {  # file -> what is in it
    "empty.txt": b"",
    "blank.txt": b"\n \n",
    "binary.txt": b"some\0bytes",
    "latin.txt": "caf\xe9".encode("latin-1"),
    "short.txt": b"hello",
    "notes.md": b"\xff\xd8 notes",
    "broken.jsonl": b'{"text": \n',
    "broken.yaml": b"run: [1,\n",
    "list.yaml": b"- 1\n",
    "binary.yaml": b"\xff\xfe\0",
    "unknown.yaml": b"model: {decodr: 1}\n",
    "text.ckpt": b"hello",
    "empty.ckpt": b"",
    "cut.ckpt": b"\x80\x02.",  # a pickle that ends too early
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of bad files, and the current directory; a test must leave nothing else there."""
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled.ckpt")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], ("nowhere.txt", "does not exist")),
        (["empty.txt"], ("empty.txt", "no documents")),
        (["blank.txt"], ("blank.txt", "no documents")),
        (["binary.txt"], ("binary.txt", "binary", "UTF-8")),
        (["latin.txt"], ("latin.txt", "0xe9", "UTF-8")),
        (["notes.md"], ("notes.md", "neither text nor JSON lines", ".txt or .jsonl")),
        (["broken.jsonl"], ("broken.jsonl line 1", "JSON")),
        (["folder"], ("folder", "no .txt, .jsonl or .parquet")),
        (["short.txt", "--tokenizer", "bpe:257", "--rows", "stream"], ("6 tokens", "128", "seq_len")),
        (["short.txt", "--tokenizer", "bpe:12"], ("bpe:12", "bpe:257")),
        (["short.txt", "--tokenizer", "nowhere.json"], ("nowhere.json", "bpe:SIZE")),
        (["short.txt", "--seq-len", "0"], ("--seq-len", "'0'", "at least 1")),
        (["short.txt", "--seq-len", "x"], ("--seq-len", "'x'", "whole number")),
        (["short.txt", "--val-fraction", "2"], ("val_fraction", "2.0", "below 1")),
        (["short.txt", "--colour", "red"], ("--colour red", "--help")),
        (["short.txt", "--seed", "-1"], ("--seed", "'-1'")),
    ],
    ids=str,
)
def test_text_that_cannot_be_packed(here, refused, arguments, words):
    message = refused("data", "pack", *arguments, "--out", "out")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("RUN", "--help")),
        (["nowhere"], ("no run at nowhere", "ltm fit")),
        (["folder"], ("folder", "no checkpoint", "ltm fit --run folder")),
        (["foreign.ckpt"], ("foreign.ckpt", "not written by `ltm fit`")),
        (["pickled.ckpt"], ("pickled.ckpt", "loaded safely")),
        (["text.ckpt"], ("text.ckpt", "loaded safely")),
        (["empty.ckpt"], ("empty.ckpt", "loaded safely")),
        (["cut.ckpt"], ("cut.ckpt", "loaded safely")),
        (["RUN", "--estimators", "bound,truth"], ("'truth'", "bound, iwae")),
        (["RUN", "--estimators", ""], ("''", "bound, iwae")),
        (["RUN", "--samples", "0"], ("--samples", "'0'", "at least 1")),
        (["RUN", "--limit", "0"], ("--limit", "'0'", "at least 1")),
        (["RUN", "--fast-steps", "-1"], ("--fast-steps", "'-1'", "at least 0")),
        (["RUN", "--seed", "-1"], ("--seed", "'-1'", "at least 0")),
        (["RUN", "--device", "gpu"], ("--device", "'gpu'", "cuda:N")),
        (["RUN", "--device", "cuda:99"], ("no device 'cuda:99'", "choose cpu")),
        (["RUN", "--data", "nowhere"], ("nowhere", "does not exist")),
        (["RUN", "--data", "empty.txt"], ("empty.txt", "no documents")),
        (["RUN", "--data", "binary.txt"], ("binary.txt", "binary")),
        (["RUN", "--data", "latin.txt"], ("latin.txt", "UTF-8")),
        (["RUN", "--data", "notes.md"], ("notes.md", ".txt or .jsonl")),
    ],
    ids=str,
)
def test_runs_and_text_that_cannot_be_scored(here, run, refused, arguments, words):
    message = refused("evaluate", *(run if argument == "RUN" else argument for argument in arguments))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "word " * 50, ("tokens", "length is 16", "shorten")),
        ("--prompt", "\udcff", ("UTF-8", "re-encode")),
        ("--temperature", "0", ("0.0", "at least 1e-6")),
        ("--temperature", "nan", ("nan", "at least 1e-6")),
        ("--top-p", "-0.1", ("top_p", "-0.1", "[0, 1]")),
        ("--top-k", "-1", ("--top-k", "'-1'")),
        ("--num-samples", "0", ("--num-samples", "'0'", "at least 1")),
        ("--max-new-tokens", "0", ("--max-new-tokens", "'0'")),
        ("--seed", "x", ("--seed", "'x'", "whole number")),
    ],
)
def test_text_that_cannot_be_written(here, run, refused, option, value, words):
    message = refused("generate", run, option, value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--greedy", "--top-k", 5), "top_k 5"),
        (("--layers", 3), "no layer 3: the layers with thoughts are counted from 1 to 2"),
        (("--layers", "two"), "two"),
        (("--stream", "--json"), "--stream"),
        (("--stream", "--num-samples", 2), "one at a time"),
        (("--interpolate", "a", "b", "--prompt", "c"), "--prompt"),
        (("--interpolate", "a", "b"), "at least 2"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other(run, refused, options, word):
    assert word in refused("generate", run, *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("data.directory", "required")),
        (["--config", "nowhere.yaml"], ("nowhere.yaml", "not exist")),
        (["--config", "broken.yaml"], ("broken.yaml", "line 2", "cannot be parsed")),
        (["--config", "list.yaml"], ("- 1",)),
        (["--config", "binary.yaml"], ("binary.yaml", "UTF-8")),
        (["--config", "unknown.yaml"], ("model", "'decodr'")),
        (["--data.directory", "folder"], ("folder", "ltm data pack")),
        (["--data.directory", "folder", "--run", "short.txt", "--trainer.max_steps", "soon"], ("soon", "int")),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_read(here, refused, arguments, words):
    ends = [] if "--config" in arguments or not arguments else ["--trainer.max_time", "00:00:00:01"]
    message = refused("fit", *ends, *arguments)
    assert all(word in message for word in words), message


LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'] * 9)}]\n" for i in range(20))
BOMBS = {  # a small file that would fill time or memory -> what is said of it
    LAUGHS: "YAML of more than 65,536 characters, its aliases written out",
    LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("lol", "{}"): "its aliases written out",
    "model:" + " # \n" * 2**15: "its aliases written out",
    "model: " + "[" * 2**15: "nested more than 50 levels deep",
    "".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else ''}]\n" for i in range(2000)): "nested more than 50 levels deep",
    "model: &a {prior: *a}": "an alias is inside of what it stands for",
    "model: " + "1" * 5000: "5000 digits",
}


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_yaml_that_would_fill_the_memory_is_not_written_out(here, run, refused, number):
    text, word = list(BOMBS.items())[number]
    (here / "list.yaml").write_text(text)
    for command in (
        ("fit", "--config"),
        ("show",),
        ("flops", "--config"),
        ("study", "run", "scaling", "--base-config"),
    ):
        assert word in refused(*command, "list.yaml")
    assert word in refused("study", "run", "scaling", "--set", f"data={text}")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["ltm_pyro"]["recipe"] = text
    torch.save(content, here / "foreign.ckpt")
    assert word in refused("generate", "foreign.ckpt")


def test_yaml_in_texts_in_texts_is_not_read_without_end(here, refused):
    text = "a"
    for _ in range(100):
        text = "a: |\n" + "\n".join(f" {line}" for line in text.splitlines())
    (here / "list.yaml").write_text("model:\n" + "\n".join(f"  {line}" for line in text.splitlines()))
    assert "YAML in texts, 6 inside of each other" in refused("show", "list.yaml")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run", "short.txt", ("short.txt is a file", "--run")),
        ("run", "/proc/nowhere/run", ("Cannot write", "/proc/nowhere/run", "--run")),
        ("data.batch_size", "many", ("data.batch_size = many", "int")),
        ("data.batch_size", "0", ("batch_size", "0")),
        ("data.tokens", "64", ("`data.batch_size` is 8 and `data.tokens` is 64", "set one of them to null")),
        ("data.directory", "nowhere", ("nowhere", "ltm data pack")),
        ("model.vocabulary", "300", ("300", "280", "model.vocabulary")),
        ("model.decoder.init_args.length", "8", ("16 tokens", "8", "--seq-len 8")),
        ("model.decoder.init_args.heads", "3", ("16", "heads")),
        ("model.decoder.init_args.colour", "3", ("model.decoder", "'colour'")),
        ("model.prior", "nowhere.Prior", ("model.prior", "nowhere")),
        ("model.inference.schedule", "linear", ("model.inference.schedule = linear", "'cosine'")),
        ("model.slow.warmup", "1", ("warmup=1.0",)),
        ("model.curriculum.steps", "[[0,.nan]]", ("`curriculum.steps` is", "nan", "finite")),
        ("model.slow.betas", "[0.9,1]", ("betas in [0, 1)", "betas=(0.9, 1.0)")),
        ("model.slow.rate", ".inf", ("rate > 0", "rate=inf")),
        ("model.slow.prior_rate", "0", ("rate > 0", "prior_rate=0.0")),
        ("model.slow.weight_decay", "-1", ("weight_decay ≥ 0", "weight_decay=-1.0")),
        ("trainer.devices", "x", ("devices", "int > 0")),
        ("trainer.gradient_clip_val", "-1", ("`trainer.gradient_clip_val` is -1", "0 or more")),
        ("trainer.max_steps", "-1", ("no end", "trainer.max_time")),
        ("trainer.max_steps", "0", ("`trainer.max_steps` is 0", "above 0")),
        ("trainer.max_epochs", "0", ("`trainer.max_epochs` is 0", "above 0")),
        ("trainer.max_time", "soon", ("soon", "DD:HH:MM:SS")),
        ("trainer.max_time", "00:00:00:00", ("`trainer.max_time` is 00:00:00:00", "no time")),
        ("trainer.accumulate_grad_batches", "0", ("`trainer.accumulate_grad_batches` is 0", "leave it out")),
        ("trainer.accumulate_grad_batches", "-2", ("`trainer.accumulate_grad_batches` is -2", "leave it out")),
        *(("model.max_flops", x, (f"`model.max_flops` is {float(x)}", "above 0")) for x in ("0", "-3")),
        *(("model.max_flops", f".{x}", (f"`model.max_flops` is {x}", "above 0")) for x in ("nan", "inf")),
        ("model.max_flops", "much", ("model.max_flops = much", "float")),
        ("trainer.val_check_interval", "0", ("val_check_interval", "limit_val_batches")),
        ("trainer.overfit_batches", "2", ("overfit_batches", "2", "pack a few texts")),
        ("trainer.num_nodes", "2", ("trainer.num_nodes", "2", "torchrun or srun")),
        ("trainer.limit_train_batches", "0", ("limit_train_batches", "0", "leave it out")),
        ("seed_everything", "-1", ("seed_everything", "-1", "from 0 to 4294967295")),
        ("colour", "red", ("--colour red",)),
        ("ckpt_path", "nowhere", ("nowhere", "ltm fit")),
        ("ckpt_path", "foreign.ckpt", ("foreign.ckpt", "ltm fit")),
    ],
)
def test_settings_that_cannot_be_trained(here, recipe, refused, key, value, words):
    message = refused("fit", "--config", recipe, "--run", "run", f"--{key}", value)
    assert all(word in message for word in words), message


def test_what_lightning_refuses_once_it_has_counted_the_batches(recipe, ltm, tmp_path):
    limit = ("--trainer.max_steps", 1, "--trainer.limit_train_batches", 0.001)
    code, out, err = ltm("fit", "--config", recipe, "--run", tmp_path / "run", *limit)
    assert (code, out) == (2, "")
    assert "ltm fit: Lightning refuses the `trainer` settings: You requested to check 0.001" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["ranks.foo", "ranks"])
def test_a_picture_of_no_known_format_is_refused_before_the_simulations(here, refused, name):
    message = refused("calibrate", "nowhere", "--picture", name)
    assert all(word in message for word in (f"as {name}:", ".png, ", ".svg")), message


def test_a_checkpoint_of_another_architecture(here, run, recipe, refused):
    larger = ("--model.decoder.init_args.layers", 3)
    message = refused("fit", "--config", recipe, "--run", "run", "--ckpt_path", run, *larger)
    assert "another architecture" in message
    assert "absent" in message


@pytest.mark.parametrize(
    "change",
    [
        {"ltm_pyro": None},
        {"ltm_pyro": {"recipe": "{}"}},
        {"ltm_pyro": {"recipe": "{}", "tokenizer": 1}},
        {"state_dict": None},
        {"state_dict": {"flops": 1}},
    ],
    ids=str,
)
def test_a_checkpoint_of_which_a_part_is_missing(run, recipe, refused, tmp_path, change):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content | change, tmp_path / "x.ckpt")
    for command in (("evaluate",), ("fit", "--config", recipe, "--run", tmp_path / "run", "--ckpt_path")):
        assert "x.ckpt is damaged, because recipe, tokenizer or weights are" in refused(*command, tmp_path / "x.ckpt")


def test_a_checkpoint_whose_tokenizer_is_none(run, recipe, refused, tmp_path):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["ltm_pyro"]["tokenizer"] = "{}"
    torch.save(content, tmp_path / "x.ckpt")
    for command in (("evaluate",), ("fit", "--config", recipe, "--run", tmp_path / "run", "--ckpt_path")):
        assert "x.ckpt: its tokenizer.json is not" in refused(*command, tmp_path / "x.ckpt")


def test_a_checkpoint_with_more_tokens_than_its_model(run, refused, tmp_path):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["ltm_pyro"]["tokenizer"] = number_tokenizer(500).to_str()
    torch.save(content, tmp_path / "x.ckpt")
    assert "x.ckpt: its tokenizer.json has 501 tokens, and its model 280" in refused("generate", tmp_path / "x.ckpt")


def test_another_vocabulary_and_longer_sequences(here, corpus, run, recipe, ltm, refused):
    for name, options in {"words": ("bpe:300", 16), "long": (run / "tokenizer.json", 32)}.items():
        packing = ("--tokenizer", options[0], "--seq-len", options[1])
        assert ltm("data", "pack", corpus, "--out", name, *packing)[0] == 0
    assert "another tokenizer" in refused("evaluate", run, "--data", "words")
    assert "--seq-len 16" in refused("evaluate", run, "--data", "long")
    message = refused("fit", "--config", recipe, "--run", "r", "--data.directory", "words", "--ckpt_path", run)
    assert "another tokenizer" in message
    for name in ("words", "long"):
        shutil.rmtree(name)


def test_an_existing_output_is_never_replaced(here, corpus, packed, recipe, run, refused, tmp_path_factory):
    files = {path: path.read_bytes() for folder in (packed, run) for path in folder.rglob("*") if path.is_file()}
    assert "--force" in refused("data", "pack", corpus, "--out", packed)
    assert "--force" in refused("fit", "--config", recipe, "--run", run)
    copy = tmp_path_factory.mktemp("copy") / "last.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", copy)
    assert "--force" in refused("fit", "--config", recipe, "--run", run, "--ckpt_path", copy)
    assert {path: path.read_bytes() for path in files} == files
    shutil.copy(run / "tokenizer.json", copy.with_name("tokenizer.json"))
    assert "holds a tokenizer.json already" in refused("fit", "--config", recipe, "--run", copy.parent)


def test_data_that_holds_nothing_out(here, corpus, recipe, ltm, refused):
    packing = ("--tokenizer", "bpe:280", "--seq-len", 16, "--val-fraction", 0)
    assert ltm("data", "pack", corpus, "--out", "train", *packing)[0] == 0
    message = refused("fit", "--config", recipe, "--run", "run", "--data.directory", "train")
    assert "--val-fraction" in message
    shutil.rmtree("train")


def test_data_without_a_training_split(here, packed, recipe, refused):
    shutil.copytree(packed, "val")
    raw = json.loads(Path("val/manifest.json").read_text())
    del raw["splits"]["train"]
    Path("val/manifest.json").write_text(json.dumps(raw))
    assert "no split 'train'" in refused("fit", "--config", recipe, "--run", "run", "--data.directory", "val")
    shutil.rmtree("val")


@pytest.mark.parametrize("arguments", [["evalute"], ["data", "unpack"], ["data", "unpack", "x"], ["Fit"]], ids=str)
def test_a_command_that_does_not_exist(refused, arguments):
    assert f"'{' '.join(arguments[:2])}'" in refused(*arguments)
