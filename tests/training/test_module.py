"""The Lightning module: curricula, warm start, persistent local parameters, and what a bad sequence does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer

from ltm_pyro.contracts import Init, ThoughtShape
from ltm_pyro.data import pack
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.local import init, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.training.check_model import check_model
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.training.module import NONFINITE, LTMModule
from ltm_pyro.training.run_directory import add_thoughts
from ltm_pyro.training.schedules import Curriculum
from ltm_pyro.training.train import NOISE

VOCABULARY = 280


def make_module(thoughts=2, **options):
    def decoder(vocabulary):
        return Decoder(vocabulary, layers=2, width=16, heads=2, thoughts=thoughts, window=4, length=16)

    few = LocalInference(steps=2)
    parts = {"decoder": decoder, "prior": GaussianPrior, "joint": LatentThoughtModel, "guide": MeanField}
    return LTMModule(**parts | {"inference": few, "evaluation": few, "vocabulary": VOCABULARY} | options)


def make_data(folder, **settings):
    text = "\n\n\n".join(f"the {i} small words of a long day are {i * 7} old" for i in range(40))
    (folder / "words.txt").write_text(text)
    tokenizer = f"bpe:{VOCABULARY}"
    pack([folder / "words.txt"], folder / "packed", tokenizer=tokenizer, seq_len=16, val_fraction=0.1, **settings)
    return PackedData(str(folder / "packed"), batch_size=8)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def train(data, tmp_path):
    quiet = {
        "default_root_dir": tmp_path,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "inference_mode": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "accelerator": "cpu",
    }

    def run(module, checkpoint=None, **options):
        trainer = Trainer(**quiet | {"max_steps": 6} | options)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return trainer

    return run


pytestmark = pytest.mark.filterwarnings(f"ignore:{NOISE}")


def count(inference):
    """Ten FLOPs a token, and ten more for every fast step."""
    return 10.0 * (1 + inference.steps)


def test_a_curriculum_moves_between_its_points():
    base = LocalInference(steps=16, rate=0.3)
    curriculum = Curriculum(
        steps=[(0, 0), (0.5, 0), (0.5, 6), (1, 6)], log_var=[(0.5, -4), (1, 0)], rate=[(0, 0.3), (1, 0.34)]
    )
    assert curriculum.at(0.2, base, count).steps == 0
    later = curriculum.at(0.75, base, count)
    assert (later.steps, later.init.log_var, round(later.rate, 3)) == (6, -2.0, 0.33)
    assert Curriculum().at(0.5, base, count) == base
    bought = Curriculum(flops_per_token=[(0, 0), (1, 100)])
    assert [bought.at(x, base, count).steps for x in (0.0, 0.2, 0.5, 1.0)] == [1, 1, 4, 9]
    with pytest.raises(UsageError, match="both steps and flops_per_token"):
        Curriculum(flops_per_token=[(0, 1)], steps=[(0, 1)])
    weights = Curriculum(kl_weight=[(0, 0.1), (1, 1)], particles=[(0, 1), (1, 4)]).at(1.0, base, count)
    assert (weights.kl_weight, weights.particles) == (1.0, 4)


def test_without_fast_steps_the_decoder_does_not_listen(train):
    module = make_module(curriculum=Curriculum(steps=[(0, 0), (0.5, 0), (0.5, 2), (1, 2)]))
    before = {n: p.detach().clone() for n, p in module.named_parameters() if "cross_attention" in n}
    train(module, max_steps=2, max_epochs=-1)
    assert any(not torch.equal(before[n], p) for n, p in module.named_parameters() if n in before)
    silent = make_module(curriculum=Curriculum(steps=[(0, 0), (1, 0)]))
    before = {n: p.detach().clone() for n, p in silent.named_parameters() if "cross_attention" in n}
    train(silent)
    assert all(torch.equal(before[n], p) for n, p in silent.named_parameters() if n in before)


def test_added_thoughts_leave_the_autoregressive_loss_exactly(train, data):
    plain = make_module(thoughts=0)
    train(plain)
    module = make_module(thoughts=2)
    add_thoughts(module, plain.state_dict(), "plain")
    batch = next(iter(data.val_dataloader()))
    expected = elbo_terms(plain.model, plain.guide, batch, _start(plain, batch)).elbo_B
    torch.testing.assert_close(elbo_terms(module.model, module.guide, batch, _start(module, batch)).elbo_B, expected)
    with pytest.raises(UsageError, match="without them"):
        add_thoughts(make_module(thoughts=0), plain.state_dict(), "plain")
    with pytest.raises(UsageError, match="without them"):
        add_thoughts(module, module.state_dict(), "thinking")


def _start(module, batch):
    return init(module.model, module.guide, batch, LocalInference()).parameters


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_local_parameters_are_kept_between_epochs_and_resumed(train, tmp_path, where):
    keep = "memory" if where == "memory" else str(tmp_path / "local")
    module = make_module(keep_local=keep)
    trainer = train(module, max_steps=-1, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    taken = module.store._arrays["steps"]
    assert taken.max() == 3 * 2
    resumed = make_module(keep_local=keep)
    train(resumed, checkpoint=tmp_path / "last.ckpt", max_steps=-1, max_epochs=4)
    assert resumed.store._arrays["steps"].max() == 4 * 2


def test_training_ends_when_the_flops_are_spent(train):
    module = make_module(max_flops=3e8)
    trainer = train(module, max_steps=-1, max_epochs=-1)
    assert module.progress == 1
    assert 3e8 <= module.flops.item() < 5e8
    assert trainer.global_step > 1


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
def test_a_bad_sequence_stops_training_by_name_or_is_skipped(train, tmp_path, slow_gradient):
    inference = LocalInference(steps=2, slow_gradient=slow_gradient)

    def spoilt(**options):
        module = make_module(inference=inference, **options)
        module.model.decoder.embedding.weight.data[VOCABULARY - 1] = torch.nan
        return module

    module = spoilt()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(UsageError, match=r"No finite ELBO at step 0 for the sequences \[\d+"):
        train(module)
    saved = json.loads((tmp_path / NONFINITE).read_text())
    assert (saved["step"], saved["what"], bool(saved["ids"])) == (0, "ELBO", True)
    skipping = spoilt(on_nonfinite="skip")
    with pytest.warns(UserWarning, match="the batch is skipped"):
        train(skipping, max_steps=2, max_epochs=1)
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[n], equal_nan=True)


def test_a_bad_gradient_names_the_sequences_of_every_accumulated_batch(train, tmp_path):
    module = make_module(on_nonfinite="skip")
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module.model.decoder.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.warns(UserWarning, match="No finite gradient at step"):
        train(module, max_steps=2, accumulate_grad_batches=2)
    lines = [json.loads(line) for line in (tmp_path / NONFINITE).read_text().splitlines()]
    assert [line["what"] for line in lines] == ["gradient"] * 2
    assert all(len({*line["ids"]}) == len(line["ids"]) > 8 for line in lines)
    assert not {*lines[0]["ids"]} & {*lines[1]["ids"]}
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_half_precision_goes_with_clipping_under_a_fused_optimiser(train, monkeypatch, algorithm):
    module, largest = make_module(), 1e-3
    optimizer = module.optimizer_step
    found = []

    def step(*arguments, **options):
        optimizer(*arguments, **options)
        found.append(torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None]))

    monkeypatch.setattr(module, "optimizer_step", step)
    clip = {"gradient_clip_val": largest, "gradient_clip_algorithm": algorithm}
    train(module, precision="bf16-mixed", max_steps=2, **clip)
    assert module.optimizers().defaults["fused"]
    for gradient in found:
        size = gradient.norm() if algorithm == "norm" else gradient.abs().max()
        assert size == pytest.approx(largest, rel=1e-3)


def test_validation_without_gradients_is_explained(data):
    module, batch = make_module(), next(iter(data.val_dataloader()))
    with torch.inference_mode(), pytest.raises(UsageError, match="inference_mode=False"):
        module.validation_step(batch, 0)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(train, tmp_path):
    from ltm_pyro.training.checkpoints import Checkpoints, Saving

    path = tmp_path / "last.ckpt"

    class Poison(make_module().__class__):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 3:
                next(self.model.parameters()).grad.fill_(torch.nan)
            super().on_before_optimizer_step(optimizer)

    module = make_module()
    module.__class__ = Poison
    with pytest.raises(UsageError, match="No finite gradient at step 3"):
        train(module, callbacks=[Checkpoints(path, "", "", Saving(every=1))], enable_checkpointing=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(x.isfinite().all() for x in saved.values())
    module.model.decoder.embedding.weight.data.fill_(torch.nan)
    before = path.read_bytes()
    Checkpoints(path, "", "")._save(module.trainer)
    assert path.read_bytes() == before


GOLDEN = {
    "golden_curve.txt": {"rows": "stream", "test_fraction": 0.0, "keep_together": "exact"},  # as before format 3
    "golden_documents.txt": {"rows": "documents"},
}


@pytest.mark.parametrize(("name", "settings"), GOLDEN.items(), ids=GOLDEN)
def test_the_golden_curve(tmp_path, name, settings):
    """Twenty seeded steps in float64, as stored: a refactor that moves them has changed the training.

    After a change that is meant to, write the found losses into the file and say why in the commit.
    """
    data = make_data(tmp_path, **settings)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    losses = []

    class Watched(make_module().__class__):
        def on_train_batch_end(self, *arguments):
            losses.append(self.trainer.callback_metrics["train/loss"].item())
            super().on_train_batch_end(*arguments)

    module = make_module(inference=LocalInference(steps=3, init=Init(log_var=-2.0, jitter=0.1)))
    module.__class__ = Watched
    options = {"precision": "64-true", "gradient_clip_val": 1.0, "logger": False, "limit_val_batches": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_steps=20, max_epochs=-1, accelerator="cpu", **options, **quiet).fit(module, datamodule=data)
    stored = [float(line) for line in (Path(__file__).parent / name).read_text().split()]
    torch.testing.assert_close(losses, stored, rtol=1e-7, atol=0, msg=lambda text: f"{text}\n{losses}")


def test_without_fast_steps_the_loss_is_the_autoregressive_one(data):
    curriculum = Curriculum(steps=[(0, 0), (1, 0)], log_var=[(0, -4), (1, -4)])
    inference = curriculum.at(0.0, LocalInference(), count)
    module, batch = make_module(), next(iter(data.val_dataloader()))
    assert training_loss(module.model, module.guide, batch, inference).terms.kl_B.abs().max() == 0


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
def test_algorithm_1_is_six_frames_deep(train, slow_gradient):
    """From `training_step` to the guide: what a reader has to follow of the paper's algorithm."""
    seen = []

    class Traced(MeanField):
        def __call__(self, batch, local):
            frame, names = sys._getframe(), []
            while names[-1:] != ["training_step"]:
                if "site-packages" not in frame.f_code.co_filename:  # jaxtyping's checks are there in tests only
                    names.append(frame.f_code.co_name)
                frame = frame.f_back
            seen.append(names[::-1])
            return super().__call__(batch, local)

    train(make_module(guide=Traced, inference=LocalInference(steps=2, slow_gradient=slow_gradient)), max_steps=1)
    assert seen[0] == ["training_step", "training_loss", "run_steps", "step", "elbo_terms", "__call__"]
    assert all(len(names) <= 6 for names in seen)


class OwnJoint(LatentThoughtModel):
    """A joint model of a user's own, which knows nothing of training without thoughts."""

    def forward(self, batch):
        return super().forward(batch)


def test_a_joint_of_ones_own_is_trained_and_its_prior_checked(train):
    assert train(make_module(joint=OwnJoint), max_steps=2).global_step == 2
    module = make_module(joint=OwnJoint)
    module.model.prior = GaussianPrior(ThoughtShape(1, 1, 1))
    with pytest.raises(UsageError, match="GaussianPrior returns"):
        check_model(module.model, module.guide)


def test_training_without_thoughts_needs_a_joint_that_can(train):
    without = ({"curriculum": Curriculum(steps=[(0, 2), (1, 0)])}, {"inference": LocalInference(steps=0)})
    for options in without:
        module = make_module(joint=OwnJoint, **options)
        with pytest.raises(UsageError, match=r"OwnJoint.forward .* takes no `use_thoughts`: add it"):
            check_model(module.model, module.guide, module.leaves_out_thoughts)
    baseline = make_module(joint=OwnJoint, thoughts=0, inference=LocalInference(steps=0))
    check_model(baseline.model, baseline.guide, baseline.leaves_out_thoughts)
    assert train(baseline, max_steps=2).global_step == 2


def test_q_of_the_prompt_alone_trains_with_the_last_gradient(tmp_path, train):
    records = [{"prompt": "the day ", "completion": f"is {n} old"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = f"bpe:{VOCABULARY}"
    pack([tmp_path / "a.jsonl"], tmp_path / "prompts", tokenizer=tokenizer, seq_len=16, keep_together="exact")
    batch = next(iter(PackedData(str(tmp_path / "prompts"), score="completion", observe="prompt").train_dataloader()))
    module = make_module()
    found = training_loss(module.model, module.guide, batch, LocalInference(steps=2, slow_gradient="last"))
    assert found.loss.isfinite()
    swapped = batch._replace(targets_BT=torch.where(batch.observed_BT, batch.targets_BT, 0))
    torch.manual_seed(0)
    one = training_loss(module.model, module.guide, batch, LocalInference(steps=2, slow_gradient="last")).state
    torch.manual_seed(0)
    other = training_loss(module.model, module.guide, swapped, LocalInference(steps=2, slow_gradient="last")).state
    torch.testing.assert_close(one.parameters, other.parameters)  # q has not seen the completion
    with pytest.raises(UsageError, match="Where q sees other tokens than are scored"):
        training_loss(module.model, module.guide, batch, LocalInference(steps=2, slow_gradient="trajectory"))
