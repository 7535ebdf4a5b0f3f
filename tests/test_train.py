"""The trainer: it learns, it keeps what it says, it resumes to the same numbers."""

import dataclasses
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import started
from test_data import write_pair

from segmenter_fast import SegmenterModel, create_model
from segmenter_fast import evaluate as evaluate_module
from segmenter_fast import train as train_module
from segmenter_fast.blocks import Attention
from segmenter_fast.data import Augmentation, FolderDataset, Scenes, make_loader, normalise
from segmenter_fast.data.loader import TrainSampler
from segmenter_fast.evaluate import evaluate
from segmenter_fast.runlog import read_log
from segmenter_fast.train import (
    TrainOptions,
    class_weights,
    make_optimizer,
    poly_lr,
    step_seed,
    train,
)

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


def states(*folders):
    return [torch.load(folder / "state.pt", weights_only=True) for folder in folders]


def same_weights(one, two):
    """Whether two saved states hold the same numbers to the bit, averages included."""
    assert one["step"] == two["step"] and one["position"] == two["position"]
    return all(
        torch.equal(value, two[part][name])
        for part in ("model", "averaged")
        for name, value in (one[part] or {}).items()
    )


def log_of(folder):
    """Rows of a log, less what depends on the clock."""
    clock = ("minutes", "images_per_second", "loader_images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_log(folder)]


def at_step(number, action, monkeypatch):
    """Do something at the begin of a step."""
    real = train_module.poly_lr

    def watched(step, options):
        if step == number:
            monkeypatch.setattr(train_module, "poly_lr", real)
            action()
        return real(step, options)

    monkeypatch.setattr(train_module, "poly_lr", watched)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_resume_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    """To the bit, with dropout and stochastic depth; the log, too."""
    options = dataclasses.replace(OPTIONS, steps=8, save_every=3, val_every=4, log_every=2)
    train(*setup(), tmp_path / "whole", options)
    at_step(5, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(*setup(), tmp_path / "run", options)
    assert states(tmp_path / "run")[0]["step"] == 4
    changed = dataclasses.replace(options, workers=1)  # that does not matter
    train(*setup(seed=9), tmp_path / "run", changed, resume=True)
    whole, run = states(tmp_path / "whole", tmp_path / "run")
    assert run["step"] == 8 and same_weights(whole, run)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run")
    assert [row["step"] for row in log_of(tmp_path / "run")] == [2, 4, 6, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [False, True])
def test_on_a_gpu(tmp_path, monkeypatch, amp):
    """Bytes go over from pinned memory, and an interrupted run ends as a whole one does."""
    options = dataclasses.replace(OPTIONS, steps=8, save_every=3, val_every=4, workers=1, amp=amp)

    def on_gpu(seed=0):
        model, *data = setup(seed)
        return model.cuda(), *data

    train(*on_gpu(), tmp_path / "whole", options)
    at_step(5, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(*on_gpu(), tmp_path / "run", options)
    result = train(*on_gpu(seed=9), tmp_path / "run", options, resume=True)
    assert result["finished"] and math.isfinite(log_of(tmp_path / "run")[-1]["loss"])
    whole, run = states(tmp_path / "whole", tmp_path / "run")
    for name, value in whole["model"].items():  # cuBLAS need not choose alike twice
        torch.testing.assert_close(run["model"][name], value, rtol=1e-2, atol=1e-3)


def test_states_of_older_runs_can_be_resumed(tmp_path, monkeypatch):
    """Those that were saved before some of the options and some of the state existed."""
    options = dataclasses.replace(OPTIONS, steps=6, save_every=3)
    train(*setup(), tmp_path / "whole", options)
    at_step(3, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(*setup(), tmp_path / "run", options)
    [state] = states(tmp_path / "run")
    new = {"accumulate", "recompute", "compile", "val_every", "log_every"}
    state["options"] = {k: v for k, v in state["options"].items() if k not in new}
    old = ("step", "best_miou", "best_step", "model", "optimizer", "averaged", "options")
    torch.save(
        {k: state[k] for k in old} | {"rng": torch.get_rng_state()}, tmp_path / "run/state.pt"
    )
    train(*setup(seed=9), tmp_path / "run", options, resume=True)
    assert same_weights(*states(tmp_path / "whole", tmp_path / "run"))


def test_dropout_of_a_step_follows_from_seed_step_and_process():
    seeds = {step_seed(*key) for key in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27 and step_seed(1, 2, 3) == step_seed(1, 2, 3)


# --- The recipe ----------------------------------------------------------------------------------

# What is left to chance in the model would differ between parts, so it is switched off.
PLAIN = {"drop_path_rate": 0.0, "decoder_dropout": 0.0}


def tiny(n_cls=11, **changes):
    """A model of some ten thousand weights."""
    torch.manual_seed(0)
    fields = {"d_model": 32, "n_layers": 2, "n_heads": 1, "decoder_n_layers": 1}
    return create_model("Seg-N-Mask/16", n_cls, (32, 48), **(fields | changes))


def void_scenes():
    """Scenes of which each has more pixels without a label than the one before."""
    samples = [(image, target.clone()) for image, target in Scenes(4, size=(32, 48))]
    for i, (_, target) in enumerate(samples):
        target[:, : 12 * i] = 255
    return samples


def test_passes_of_a_step_add_up_to_one(tmp_path):
    """Four passes with unequal numbers of labelled pixels, weighed and smoothed, equal one."""
    options = TrainOptions(
        steps=4, batch_size=4, lr=0.1, class_weights=0.5, label_smoothing=0.1, clip=0.5
    )
    for accumulate in (1, 2, 4):
        recipe = dataclasses.replace(options, accumulate=accumulate)
        train(tiny(**PLAIN), void_scenes(), void_scenes()[:1], tmp_path / str(accumulate), recipe)
    once, *parts = states(*(tmp_path / name for name in "124"))
    for state in parts:
        for name, value in once["model"].items():
            torch.testing.assert_close(state["model"][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(once["model"]["decoder.cls_emb"], tiny().decoder.cls_emb)


def test_the_loss_is_the_mean_that_the_model_has(tmp_path):
    """Of the first step, which `reduction="mean"` on the whole batch gives as well."""
    options = TrainOptions(steps=1, batch_size=4, accumulate=2, label_smoothing=0.1)
    data = void_scenes()
    train(tiny(**PLAIN), data, data[:1], tmp_path / "run", options)
    [batch] = make_loader(data, Augmentation((32, 48)), 4, 1)
    model = tiny(**PLAIN)
    images = normalise(batch.images, batch.sizes, model.config.mean, model.config.std)
    loss = model(images, batch.target, label_smoothing=0.1)
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_changes_nothing_but_the_work(tmp_path, monkeypatch, recompute):
    """Weights to the bit, with dropout and stochastic depth; each block runs twice in a step."""
    options = TrainOptions(steps=2, batch_size=2, lr=0.1, val_limit=1, recompute=recompute)
    calls, real = [], Attention.forward
    monkeypatch.setattr(
        Attention, "forward", lambda self, x: (calls.append(self.training), real(self, x))[1]
    )
    model = tiny(drop_path_rate=0.4, decoder_dropout=0.3)
    keys = list(model.state_dict())
    train(model, Scenes(4, size=(32, 48)), Scenes(1, size=(32, 48)), tmp_path / "run", options)
    assert list(model.state_dict()) == keys
    assert sum(calls) == 2 * 3 * (2 if recompute else 1)
    again = tiny(drop_path_rate=0.4, decoder_dropout=0.3)
    recipe = dataclasses.replace(options, recompute=not recompute)
    train(again, Scenes(4, size=(32, 48)), Scenes(1, size=(32, 48)), tmp_path / "other", recipe)
    assert same_weights(*states(tmp_path / "run", tmp_path / "other"))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)]
)
def test_compiled_training(tmp_path, monkeypatch, backend):
    """The same numbers to rounding and the same names, with blocks recomputed as well.

    Traced and differentiated as always, but what that gives is compiled to C++ in nightly runs.
    """
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=backend))
    data = Scenes(2, size=(32, 48))
    options = TrainOptions(steps=3, batch_size=2, lr=0.1, val_limit=1)
    model = {"n_layers": 1, "decoder": "linear", **PLAIN}
    train(tiny(**model), data, data, tmp_path / "eager", options)
    options = dataclasses.replace(options, compile=True, recompute=True)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    train(tiny(**model), data, data, tmp_path / "compiled", options)
    assert frames["ok"] > before
    eager, compiled = states(tmp_path / "eager", tmp_path / "compiled")
    assert list(eager["model"]) == list(compiled["model"])
    for name, value in eager["model"].items():
        torch.testing.assert_close(compiled["model"][name], value, rtol=1e-3, atol=1e-4)


def test_bfloat16(tmp_path, monkeypatch):
    seen, real = [], torch.nn.Linear.forward

    def linear(self, x):
        y = real(self, x)
        seen.append((self.training, y.dtype))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    options = TrainOptions(steps=2, batch_size=2, amp=True, val_limit=1)
    model = tiny()
    train(model, Scenes(2, size=(32, 48)), Scenes(1, size=(32, 48)), tmp_path / "run", options)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("accumulate", [1, 4])
def test_non_finite_loss_names_the_files_of_the_pass(tmp_path, monkeypatch, accumulate):
    """One white picture, met after a run was resumed in the midst of an epoch."""
    for stem in "abcdef":
        write_pair(tmp_path, stem, size=(32, 48))
    data = FolderDataset(tmp_path / "images/train", tmp_path / "annotations/train", ["x", "y"])
    options = TrainOptions(
        steps=8, batch_size=4, accumulate=accumulate, jitter=0, scale=(1, 1), save_every=1,
        val_every=8, log_every=1,
    )  # fmt: skip
    at_step(2, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(n_cls=2), data, data, tmp_path / "run", options)
    Image.new("RGB", (48, 32), "white").save(tmp_path / "images/train/c.jpg")
    keys = list(TrainSampler(6, 4, 8))
    bad = next(i for i in range(2, 8) if 2 in [index for _, index in keys[i]])

    real = SegmenterModel.loss

    def loss(self, images, target, **how):
        return real(self, images, target, **how) * (math.nan if images.max() > 0.9 else 1)

    monkeypatch.setattr(SegmenterModel, "loss", loss)
    with pytest.raises(FloatingPointError, match=f"at step {bad}: .*batch") as caught:
        train(tiny(n_cls=2), data, data, tmp_path / "run", options, resume=True)
    named = {Path(name).stem for name in str(caught.value).split("too: ")[1].split(", ")}
    whole = {"abcdef"[index] for _, index in keys[bad]}
    assert named == (whole if accumulate == 1 else {"c"})
    assert states(tmp_path / "run")[0]["step"] == bad


# --- Interruptions -------------------------------------------------------------------------------


def test_sigterm_saves_after_the_step(tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, steps=5, save_every=100, val_every=5)
    train(*setup(), tmp_path / "whole", options)
    at_step(2, terminate, monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    result = train(*setup(), tmp_path / "run", options)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (result["steps"], result["finished"]) == (3, False)
    assert states(tmp_path / "run")[0]["step"] == 3
    result = train(*setup(seed=9), tmp_path / "run", options, resume=True)
    assert result["finished"] and same_weights(*states(tmp_path / "whole", tmp_path / "run"))


@pytest.mark.parametrize("when", ["before", "within"])
def test_sigterm_does_not_wait_for_a_validation(tmp_path, monkeypatch, when):
    """Which the resumed run makes up for."""
    options = dataclasses.replace(OPTIONS, steps=4, save_every=100, val_every=2)
    train(*setup(), tmp_path / "whole", options)
    predicted, predict = [], evaluate_module.predict

    def interrupted(*args, **options):
        predicted.append(args)
        terminate()
        return predict(*args, **options)

    if when == "within":
        monkeypatch.setattr(evaluate_module, "predict", interrupted)
    else:
        save = train_module._Run._save
        monkeypatch.setattr(train_module._Run, "_save", lambda run: (save(run), terminate())[0])
    result = train(*setup(), tmp_path / "run", options)
    assert (result["steps"], result["finished"]) == (2, False)
    assert len(predicted) == (when == "within")
    assert states(tmp_path / "run")[0]["validated"] == 0
    assert not (tmp_path / "run/log.jsonl").exists()
    monkeypatch.undo()
    train(*setup(seed=9), tmp_path / "run", options, resume=True)
    assert same_weights(*states(tmp_path / "whole", tmp_path / "run"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run")


def test_sigterm_ends_the_command_with_0(tmp_path):
    """Also where a worker gets the signal, as from SLURM."""
    words = [
        "train", "--model", "Seg-N-Mask/16", "--dataset", "scenes", "--count", "6", "--val-count",
        "1", "--image-size", "32,48", "--batch-size", "2", "--steps", "100000", "--workers", "1",
        "--log-every", "1", "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    process = started("-m", "segmenter_fast", *words, start_new_session=True)
    wait_for((tmp_path / "run/log.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "stopped by SIGTERM after step" in output and "--resume continues" in output
    assert states(tmp_path / "run")[0]["step"] >= 1


def test_killed_at_random_moments_and_within_saves(tmp_path):
    """A dozen times, each time resumed: the weights are those of a run that nobody disturbed."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = started(str(Path(__file__).parent / "killed_runs.py"), str(whole), str(run), "0")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    _, kills, _, torn = output.splitlines()[-1].split()
    assert int(kills) >= 6 and int(torn) >= 1, output
    assert states(run)[0]["step"] == 20 and same_weights(*states(whole, run))
    assert log_of(whole) == log_of(run)
    assert not list(run.glob("**/.*.tmp"))
    best = [SegmenterModel.from_pretrained(folder / "best").parameters() for folder in (whole, run)]
    assert all(torch.equal(one, two) for one, two in zip(*best, strict=True))


@pytest.mark.parametrize("file", ["state.pt", "last/model.safetensors"])
def test_full_disk(tmp_path, monkeypatch, file):
    """From the fourth step on files cannot become as long as the one that is to be written."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
    options = dataclasses.replace(OPTIONS, steps=6, save_every=2, val_every=6)
    train(*setup(), tmp_path / "whole", options)
    room = (tmp_path / "whole" / file).stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    at_step(3, fill, monkeypatch)
    try:
        with pytest.raises(OSError, match=r"cannot save step 4 .*too large.* step 2 is intact"):
            train(*setup(), tmp_path / "run", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert states(tmp_path / "run")[0]["step"] == 2
    assert not list((tmp_path / "run").glob("**/.*.tmp"))
    train(*setup(seed=9), tmp_path / "run", options, resume=True)
    assert same_weights(*states(tmp_path / "whole", tmp_path / "run"))


# --- Processes -----------------------------------------------------------------------------------

TWENTY_STEPS = [
    "--model", "Seg-N-Mask/16", "--dataset", "scenes", "--count", "6", "--val-count", "3",
    "--image-size", "32,48", "--batch-size", "4", "--steps", "20", "--lr", "0.01", "--drop-path",
    "0", "--decoder-dropout", "0", "--class-weights", "0.5", "--clip", "1", "--ema", "0.9",
    "--device", "cpu",
]  # fmt: skip


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    process = started("-m", "segmenter_fast.train", *TWENTY_STEPS, "-o", str(folder))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return folder


def assert_same_run(folder, alone):
    one, two = states(alone, folder)
    assert two["step"] == 20 and one["position"] == two["position"]
    for part in ("model", "averaged"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5)
    [expected], [row] = log_of(alone), log_of(folder)
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert row["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(tmp_path, alone, accumulate):
    """Under torchrun: weights, loss, averages and validation after twenty steps."""
    process = started(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "segmenter_fast.train", *TWENTY_STEPS, "--accumulate", str(accumulate),
        "-o", str(tmp_path / "run"),
    )  # fmt: skip
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count("best mIoU") == output.count("pixel accuracy") == 1
    assert_same_run(tmp_path / "run", alone)


def test_two_processes_of_slurm(tmp_path, alone):
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    words = ("-m", "segmenter_fast", "train", *TWENTY_STEPS, "-o", str(tmp_path / "run"))
    processes = [started(*words, SLURM_PROCID=rank, SLURM_LOCALID=rank, **slurm) for rank in "01"]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output.count("best mIoU") for output in outputs] == [1, 0]
    assert_same_run(tmp_path / "run", alone)


def test_processes_and_passes_must_be_able_to_share_a_batch(tmp_path):
    options = dataclasses.replace(OPTIONS, accumulate=4)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 4, 1 processes times"):
        train(*setup(), tmp_path / "run", options)


# --- Smaller things ------------------------------------------------------------------------------


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
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"val_every": -1}, "val_every must be 0 or more"),
    ],
)
def test_rejects_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)
