"""Train a Segmenter in one process: `segmenter-fast train`, or `python -m segmenter_fast.train`.

The loss runs through `model(images, target)`. Every sample is drawn from a numbered stream, so that
a run that was stopped and resumed sees the pictures it would have seen.
"""

import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from segmenter_fast.data.folder import spread
from segmenter_fast.data.transforms import TrainStream, TrainTransform
from segmenter_fast.evaluate import evaluate
from segmenter_fast.files import replacing


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """A training recipe; the defaults are the paper's for ADE20K but for the length of the run.

    Args:
        steps: optimiser steps.
        batch_size: samples of a step.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw" (betas 0.9, 0.98).
        lr, min_lr: learning rate after the warm-up and at the end, along (1 - t)^0.9.
        warmup: steps of linear warm-up.
        weight_decay: of everything but biases, norms and `model.no_weight_decay()`.
        clip: largest gradient norm; 0 leaves gradients alone.
        scale: (low, high) of the random zoom.
        jitter: strength of the photometric distortion.
        class_weights: exponent p of the loss weights (share of pixels)^-p; 0 weighs all alike, 0.5
            is a good start where rare classes matter.
        label_smoothing: of the cross-entropy.
        ema: decay of the averaged weights that are evaluated and kept; 0 keeps the last ones.
        amp: autocast to bfloat16.
        save_every: steps between evaluations, each of which updates `last` and perhaps `best`.
        val_limit: evaluate on at most this many validation images while training; 0 is all.
        workers: processes that decode and augment.
        seed: of the initialisation, the order and every sample.

    Source: Strudel et al. 2021, section 4.2.
    """

    steps: int = 10_000
    batch_size: int = 8
    optimizer: str = "sgd"
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    scale: tuple[float, float] = (0.5, 2.0)
    jitter: float = 1.0
    class_weights: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    amp: bool = False
    save_every: int = 500
    val_limit: int = 0
    workers: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if not 0 <= self.class_weights <= 1:
            raise ValueError(f"class_weights must be in [0, 1], got {self.class_weights}")
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {self.scale}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")


def poly_lr(step: int, options: TrainOptions) -> float:
    """Learning rate of a step: linear warm-up, then (1 - t)^0.9 from lr to min_lr."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    t = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.min_lr + (options.lr - options.min_lr) * (1 - t) ** 0.9


def make_optimizer(model, options: TrainOptions) -> torch.optim.Optimizer:
    """SGD or AdamW; biases, norms and `no_weight_decay()` parameters go without decay."""
    exempt = model.no_weight_decay()
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))


def class_weights(
    dataset, num_classes: int, power: float, ignore_index: int = 255, samples: int = 256
) -> torch.Tensor:
    """(K,) float32 weights (share of pixels)^-power, mean 1; from at most `samples` label maps."""
    counts = torch.zeros(num_classes, dtype=torch.float64)
    stride = max(1, len(dataset) // samples)
    for index in range(0, len(dataset), stride):
        target = dataset[index][1]
        counts += torch.bincount(target[target != ignore_index].long(), minlength=num_classes)
    share = counts / counts.sum()
    # A class seen nowhere would weigh infinitely much; it weighs as much as the rarest one seen.
    share = share.clamp_min(share[share > 0].min())
    weights = share**-power
    return (weights / weights.mean()).float()


class Averaged:
    """Exponential moving average of a model's parameters; young averages forget faster."""

    def __init__(self, model, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model, step: int) -> None:
        """Move towards `model`'s parameters."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)


def train(model, train_set, val_set, output, options: TrainOptions, resume: bool = False) -> dict:
    """Train `model` and keep `last` and `best` (by validation mIoU) in the folder `output`.

    Args:
        model: a `SegmenterModel`; its config gives crop and normalisation.
        train_set, val_set: map an index to (uint8 image (3, H, W), uint8 labels (H, W)).
        output: folder for last/, best/, log.jsonl and state.pt (what `resume` continues from).
        options: the recipe.
        resume: continue a run that was stopped, from its last save.

    Returns:
        dict with "best_miou", "best_step" and "steps".

    Raises:
        FileExistsError: the folder holds a run and `resume` is False.
        FileNotFoundError: `resume` without a run to continue.
        FloatingPointError: the loss is not finite; what was saved before stays.
    """
    output = Path(output)
    state_file, log_file = output / "state.pt", output / "log.jsonl"
    if resume and not state_file.exists():
        raise FileNotFoundError(f"nothing to resume: {state_file} does not exist")
    if not resume and (state_file.exists() or log_file.exists()):
        raise FileExistsError(
            f"{output} holds a run: continue it with resume, or choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)

    device = next(model.parameters()).device
    config = model.config
    ignore_index = getattr(train_set, "ignore_index", 255)
    transform = TrainTransform(
        config.image_size, config.mean, config.std, options.scale, jitter=options.jitter,
        ignore_index=ignore_index,
    )  # fmt: skip
    weight = None
    if options.class_weights:
        power = options.class_weights
        weight = class_weights(train_set, config.n_cls, power, ignore_index).to(device)
    val_set = spread(val_set, options.val_limit or None)

    optimizer = make_optimizer(model, options)
    averaged = Averaged(model, options.ema) if options.ema else None
    state = {"step": 0, "best_miou": -1.0, "best_step": 0}
    torch.manual_seed(options.seed)
    if resume:
        state = _restore(state_file, model, optimizer, averaged, options)

    first = state["step"]
    stream = TrainStream(train_set, transform, options.seed, options.steps * options.batch_size)
    remaining = Subset(stream, range(first * options.batch_size, len(stream)))
    loader = DataLoader(
        remaining,
        options.batch_size,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=options.workers > 0,
        prefetch_factor=4 if options.workers else None,
        # Else starting the loader would draw from the generator of dropout, in resumed runs too.
        generator=torch.Generator(),
    )

    model.train()
    started, loss_sum, loss_count = time.perf_counter(), 0.0, 0
    bar = tqdm(total=options.steps, initial=first, desc="train", unit="step")
    for step, (images, target) in enumerate(loader, start=first):
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, options)
        images = images.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            loss = model(
                images, target, weight=weight, label_smoothing=options.label_smoothing,
                ignore_index=ignore_index,
            )  # fmt: skip
        value = loss.item()
        if math.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if options.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            if averaged:
                averaged.update(model, step)
            loss_sum, loss_count = loss_sum + value, loss_count + 1
        elif not bool((target == ignore_index).all()):
            raise FloatingPointError(
                f"the loss is {value} at step {step}: lower the learning rate (now "
                f"{poly_lr(step, options):g}), add warm-up, or clip gradients"
            )
        # else: a batch without a labelled pixel has no mean and teaches nothing
        bar.update()
        bar.set_postfix(loss=f"{value:.3f}", best=f"{state['best_miou']:.3f}")

        state["step"] = step + 1
        if state["step"] % options.save_every == 0 or state["step"] == options.steps:
            kept = averaged.model if averaged else model
            result = evaluate(kept, val_set, progress=False, ignore_index=ignore_index)
            kept.save_pretrained(output / "last")
            if result["miou"] > state["best_miou"]:
                state |= {"best_miou": result["miou"], "best_step": state["step"]}
                kept.save_pretrained(output / "best")
            model.train()
            _save_state(state_file, state, model, optimizer, averaged, options)
            row = {
                "step": state["step"],
                "minutes": round((time.perf_counter() - started) / 60, 2),
                "lr": poly_lr(step, options),
                "loss": loss_sum / max(1, loss_count),
                "miou": result["miou"],
                "pixel_accuracy": result["pixel_accuracy"],
                "iou": result["iou"],
            }
            loss_sum, loss_count = 0.0, 0
            with log_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bar.write(
                f"step {row['step']:6d}  loss {row['loss']:.4f}  mIoU {100 * row['miou']:.2f}  "
                f"pixel accuracy {100 * row['pixel_accuracy']:.2f}"
            )
    bar.close()
    return {
        "best_miou": state["best_miou"],
        "best_step": state["best_step"],
        "steps": state["step"],
    }


def _save_state(path: Path, state, model, optimizer, averaged, options) -> None:
    """Everything `resume` needs, written whole or not at all."""
    content = state | {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "averaged": averaged.model.state_dict() if averaged else None,
        "options": dataclasses.asdict(options),
        "rng": torch.get_rng_state(),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _restore(path: Path, model, optimizer, averaged, options) -> dict:
    content = torch.load(path, map_location="cpu", weights_only=True)
    before, now = content["options"], dataclasses.asdict(options)
    changed = {
        k: (before.get(k), now[k]) for k in now if before.get(k) != now[k] and k != "workers"
    }
    if changed:
        text = ", ".join(f"{k}: {a!r} then, {b!r} now" for k, (a, b) in changed.items())
        raise ValueError(f"the run in {path.parent} was started with other options ({text})")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if averaged:
        averaged.model.load_state_dict(content["averaged"])
    torch.set_rng_state(content["rng"])
    return {key: content[key] for key in ("step", "best_miou", "best_step")}


if __name__ == "__main__":
    import sys

    from segmenter_fast.cli import main

    main(["train", *sys.argv[1:]])
