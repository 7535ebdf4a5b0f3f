"""The trainer: it learns, it keeps what it says, it resumes to the same numbers."""

import dataclasses
import json
import math

import pytest
import torch

from segmenter_fast import SegmenterModel, create_model
from segmenter_fast import train as train_module
from segmenter_fast.data import Scenes
from segmenter_fast.evaluate import evaluate
from segmenter_fast.train import TrainOptions, class_weights, make_optimizer, poly_lr, train

OPTIONS = TrainOptions(
    steps=6, batch_size=2, optimizer="adamw", lr=1e-3, warmup=2, save_every=3, val_limit=2, ema=0.9,
    class_weights=0.5, clip=1.0,
)  # fmt: skip


def setup(seed=0):
    torch.manual_seed(seed)
    data = Scenes(8, size=(32, 48), split="train"), Scenes(3, size=(32, 48), split="val")
    model = create_model(
        "Seg-N-Mask/8", data[0].num_classes, (32, 48), class_names=data[0].class_names
    )
    return model, *data


def test_keeps_last_and_best(tmp_path):
    result = train(*setup(), tmp_path / "run", OPTIONS)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert result["best_miou"] == max(row["miou"] for row in rows)
    best = SegmenterModel.from_pretrained(tmp_path / "run/best")
    assert best.config.class_names == setup()[1].class_names
    again = evaluate(best, torch.utils.data.Subset(setup()[2], [0, 1]), progress=False)
    assert again["miou"] == pytest.approx(result["best_miou"], abs=1e-9)
    assert (tmp_path / "run/last/model.safetensors").exists()


def test_resume_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    train(*setup(), tmp_path / "whole", OPTIONS)
    real, calls = train_module.poly_lr, []

    def killed(step, options):
        calls.append(step)
        if step == 4:
            raise KeyboardInterrupt
        return real(step, options)

    monkeypatch.setattr(train_module, "poly_lr", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*setup(), tmp_path / "run", OPTIONS)
    monkeypatch.undo()
    train(*setup(seed=9), tmp_path / "run", OPTIONS, resume=True)
    states = [
        torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "run")
    ]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-4, atol=1e-5)
    assert states[0]["step"] == states[1]["step"] == 6


def test_learns(tmp_path):
    """Forty steps on four scenes bring the loss well below its start."""
    model, train_set, val_set = setup()
    train_set = torch.utils.data.Subset(train_set, range(4))
    options = TrainOptions(
        steps=40, batch_size=4, optimizer="adamw", lr=2e-3, warmup=5, save_every=10, val_limit=1,
        jitter=0.0, scale=(1, 1), clip=1.0,
    )  # fmt: skip
    train(model, train_set, val_set, tmp_path / "run", options)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_refuses_to_overwrite_and_to_resume_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(*setup(), tmp_path / "run", OPTIONS, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="holds a run"):
        train(*setup(), tmp_path / "run", OPTIONS)


def test_resume_with_other_options_is_refused(tmp_path):
    options = dataclasses.replace(OPTIONS, steps=1)
    train(*setup(), tmp_path / "run", options)
    with pytest.raises(ValueError, match=r"lr: 0\.001 then, 0\.1 now"):
        train(*setup(), tmp_path / "run", dataclasses.replace(options, lr=0.1), resume=True)


def test_non_finite_loss_stops_and_says_what_to_do(tmp_path):
    model, *data = setup()
    with torch.no_grad():
        model.decoder.mask_norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan at step 0: lower the learning rate"):
        train(model, *data, tmp_path / "run", OPTIONS)


def test_batches_without_a_label_are_passed_over_and_still_counted(tmp_path):
    """The last step saves, also when its batch is all void."""
    model, train_set, val_set = setup()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    void = [(image, torch.full_like(target, 255)) for image, target in train_set]
    options = dataclasses.replace(OPTIONS, class_weights=0.0)
    result = train(model, void, val_set, tmp_path / "run", options)
    assert result["steps"] == 6
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_poly_lr():
    options = TrainOptions(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    assert poly_lr(0, options) == pytest.approx(0.1)
    assert poly_lr(9, options) == pytest.approx(1.0)
    assert poly_lr(10, options) == pytest.approx(1.0)
    assert poly_lr(60, options) == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    assert poly_lr(109, options) < 0.12


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = setup()[0]
    decayed, spared = (
        {id(p) for p in group["params"]}
        for group in make_optimizer(model, TrainOptions(weight_decay=0.1)).param_groups
    )
    for name, p in model.named_parameters():
        free = p.ndim == 1 or name.endswith(("pos_embed", "cls_token", "cls_emb"))
        assert (id(p) in spared) == free and (id(p) in decayed) != free, name


def test_class_weights():
    target = torch.tensor([[0] * 9 + [1, 255, 255]])
    weights = class_weights([(None, target)], 3, power=0.5)
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert weights[2] == weights[1]  # never seen: as the rarest seen
    assert weights.mean() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be"),
        ({"class_weights": 2.0}, "class_weights must be in"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scale": (2, 1)}, "scale must be"),
        ({"ema": 1.0}, "ema must be in"),
    ],
)
def test_rejects_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)
