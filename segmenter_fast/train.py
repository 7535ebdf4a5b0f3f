"""Train a Segmenter in one process or many: `segmenter-fast train`, or this module.

The loss runs through `model(images, target)`. Samples, order, stochastic depth and dropout follow
from (seed, step, process), so that a run that was stopped and resumed computes what it would have
computed. `state.pt` holds all of a run; nothing of it is ever written in place.

The loss of a step is the mean over the labelled pixels of all processes and passes. Each pass sums
its pixels' losses, and they are divided by the number of pixels of all (their weights' sum, where
classes are weighed), not averaged over parts, of which some have fewer labelled pixels.
"""

import contextlib
import copy
import dataclasses
import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from segmenter_fast.data.augment import Augmentation, normalise
from segmenter_fast.data.folder import spread
from segmenter_fast.data.loader import Batch, TrainSampler, images_per_second, make_loader
from segmenter_fast.distributed import gathered, rank, summed, world_size
from segmenter_fast.evaluate import evaluate
from segmenter_fast.files import replacing
from segmenter_fast.runlog import LOG, RunLog

# What a run may change when it is resumed: the numbers stay, but for rounding.
MEANS = {"workers", "accumulate", "recompute", "compile"}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """A training recipe; the defaults are the paper's for ADE20K but for the length of the run.

    Args:
        steps: optimiser steps.
        batch_size: samples of a step, of all processes together.
        accumulate: passes that a step is made in, each with an equal part of its samples.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw" (betas 0.9, 0.98).
        lr, min_lr: learning rate after the warm-up and at the end, along (1 - t)^0.9.
        warmup: steps of linear warm-up.
        weight_decay: of everything but biases, norms and `model.no_weight_decay()`.
        clip: largest gradient norm; 0 leaves gradients alone.
        scale: (low, high) of the random factor on the data set's `base_size`, else on a picture's.
        jitter: strength of the photometric distortion, 0 to 2.
        class_weights: exponent p of the loss weights (share of pixels)^-p; 0 weighs all alike, 0.5
            is a good start where rare classes matter.
        label_smoothing: of the cross-entropy.
        ema: decay of the averaged weights that are evaluated and kept; 0 keeps the last ones.
        amp: autocast to bfloat16.
        recompute: keep less for backward and compute it again.
        compile: torch.compile the model.
        save_every: steps between saves, from which a run that was killed is resumed.
        val_every: steps between validations, which find `best`; 0 is `save_every`.
        log_every: steps between rows of the log.
        val_limit: evaluate on at most this many validation images while training; 0 is all.
        workers: processes that decode and augment.
        seed: of the order, every sample, stochastic depth and dropout.

    Source: Strudel et al. 2021, section 4.2.
    """

    steps: int = 10_000
    batch_size: int = 8
    accumulate: int = 1
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
    recompute: bool = False
    compile: bool = False
    save_every: int = 500
    val_every: int = 0
    log_every: int = 50
    val_limit: int = 0
    workers: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if not 0 <= self.class_weights <= 1:
            raise ValueError(f"class_weights must be in [0, 1], got {self.class_weights}")
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.val_every < 0:
            raise ValueError(f"val_every must be 0 or more, got {self.val_every}")
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


def step_seed(seed: int, step: int, process: int) -> int:
    """Seed of all that is random in the model in one step of one process."""
    sequence = np.random.SeedSequence([seed, 2, step, process])
    return int(sequence.generate_state(1, np.uint64)[0])


def sample_name(dataset, index: int) -> str:
    """The file of a sample, or its number where a dataset is not made of files."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    files = getattr(dataset, "files", None)
    return f"sample {index}" if files is None else str(files[index][0])


class Termination:
    """Whether SIGTERM has come, by which clusters announce that a job is about to end.

    Only a main thread can catch signals; in another one this never tells of any.
    """

    class Now(Exception):
        """Raised where the signal came while `at_once` was true."""

    def __init__(self):
        self.requested = self.at_once = False

    def __enter__(self):
        self.catches = threading.current_thread() is threading.main_thread()
        if self.catches:
            self.before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error):
        if self.catches:
            signal.signal(signal.SIGTERM, self.before)

    def _handle(self, number, frame):
        self.requested = True
        if self.at_once:
            raise self.Now


def train(model, train_set, val_set, output, options: TrainOptions, resume: bool = False) -> dict:
    """Train `model` and keep `last` and `best` (by validation mIoU) in the folder `output`.

    Under torch.distributed every process calls this with the same model and data; `output` is a
    folder that all of them see. SIGTERM ends the run after the step it is at, saved.

    Args:
        model: a `SegmenterModel`; its config gives crop and normalisation.
        train_set, val_set: map an index to (uint8 image (3, H, W), uint8 labels (H, W)).
        output: folder for last/, best/, log.jsonl and state.pt (what `resume` continues from).
        options: the recipe.
        resume: continue a run that was stopped, from its last save.

    Returns:
        dict with "best_miou", "best_step", "steps", and "finished", which is False after SIGTERM.

    Raises:
        FileExistsError: the folder holds a run and `resume` is False.
        FileNotFoundError: `resume` without a run to continue.
        ValueError: other options than those of the run to continue, or a batch that processes and
            passes cannot share.
        FloatingPointError: the loss is not finite; what was saved before stays.
        OSError: a save failed, such as on a full disk; what was saved before stays.
    """
    output = Path(output)
    state_file, log_file = output / "state.pt", output / LOG
    if resume and not state_file.exists():
        raise FileNotFoundError(f"nothing to resume: {state_file} does not exist")
    if not resume and (state_file.exists() or log_file.exists()):
        raise FileExistsError(
            f"{output} holds a run: continue it with resume, or choose another folder"
        )
    parts = options.accumulate * world_size()
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, {world_size()} processes times "
            f"accumulate {options.accumulate}, got {options.batch_size}"
        )
    with Termination() as termination:
        return _Run(model, train_set, val_set, output, options, resume, termination).finish()


class _Run:
    """A model in training, and where it stands."""

    def __init__(self, model, train_set, val_set, output, options, resume, termination):
        self.model, self.train_set, self.options = model, train_set, options
        self.output, self.state_file = output, output / "state.pt"
        self.termination, self.talks = termination, rank() == 0
        # What all processes know of: one that stopped alone would leave the others waiting.
        self.stopping = False
        self.val_set = spread(val_set, options.val_limit or None)
        self.device = next(model.parameters()).device
        self.ignore_index = getattr(train_set, "ignore_index", 255)
        if self.talks:
            output.mkdir(parents=True, exist_ok=True)
            # A process that was killed while it saved could not tidy up.
            for stale in output.glob("**/.*.tmp"):
                stale.unlink()

        self.optimizer = make_optimizer(model, options)
        self.averaged = Averaged(model, options.ema) if options.ema else None
        self.state = {
            "step": 0, "position": (0, 0), "validated": 0, "logged": 0, "best_miou": -1.0,
            "best_step": 0, "loss_sum": 0.0, "loss_count": 0, "seconds": 0.0,
        }  # fmt: skip
        if resume:
            self._restore()
        self.saved = (self.state["step"], self.state["validated"]) if resume else None

        self.weight = None
        if options.class_weights:
            self.weight = class_weights(
                train_set, model.n_cls, options.class_weights, self.ignore_index
            ).to(self.device)
        # What a pixel of each label counts; the labels are bytes.
        self.counts = torch.zeros(256, device=self.device)
        self.counts[: model.n_cls] = 1.0 if self.weight is None else self.weight
        self.counts[self.ignore_index] = 0.0

        model.recompute = options.recompute
        if options.compile:
            model.compile()
        self.network = model
        if world_size() > 1:
            # The classification head that pretrained weights carry gets no gradient.
            self.network = DistributedDataParallel(model, find_unused_parameters=True)

    def finish(self) -> dict:
        """Train from where the run stands to its end, or to SIGTERM."""
        options, state = self.options, self.state
        first, self.start = state["step"], state["position"]
        self.started = time.perf_counter() - state["seconds"]
        config = self.model.config
        loader = make_loader(
            self.train_set,
            Augmentation(
                config.image_size,
                base=getattr(self.train_set, "base_size", None),
                factor=options.scale,
                distortion=options.jitter,
                ignore_index=self.ignore_index,
            ),
            options.batch_size // options.accumulate,
            (options.steps - first) * options.accumulate,
            options.seed,
            self.start,
            options.workers,
            pin_memory=self.device.type == "cuda",
        )
        log = RunLog(self.output, first, options.steps, state["logged"], self.talks)
        batches = iter(loader)
        self.model.train()
        self._begin_window()
        with contextlib.closing(log):
            while not self.stopping:
                step = state["step"]
                if self._validation_is_due():
                    if not self._validate(log):
                        break
                elif step > state["logged"] and step % options.log_every == 0:
                    self._log(log)
                if step % options.save_every == 0 and step > first:
                    self._save()
                if step == options.steps:
                    break
                before = time.perf_counter()
                parts = [next(batches) for _ in range(options.accumulate)]
                loss = self._step(parts)
                state["step"] += 1
                used = (state["step"] - first) * options.accumulate
                state["position"] = loader.batch_sampler.position_after(used)
                if loss is not None:
                    state["loss_sum"] += loss
                    state["loss_count"] += 1
                self.window["steps"] += 1
                self.window["seconds"] += time.perf_counter() - before
                self.window["samples"] += [part.seconds for part in parts]
                log.step(
                    loss, poly_lr(step, options), self._images_per_second(), state["best_miou"]
                )
            self._save()
        return {
            "best_miou": state["best_miou"],
            "best_step": state["best_step"],
            "steps": state["step"],
            "finished": state["validated"] == options.steps,
        }

    def _step(self, parts: list[Batch]) -> float | None:
        """One step of the optimiser; its loss, or None where no pixel has a label."""
        options, step, config = self.options, self.state["step"], self.model.config
        torch.manual_seed(step_seed(options.seed, step, rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = poly_lr(step, options)
        targets = [part.target.to(self.device, non_blocking=True) for part in parts]
        total = summed(torch.stack([self.counts[t.int()].sum() for t in targets]).sum())
        # DistributedDataParallel averages gradients, which are to be added up.
        share = world_size() / torch.where(total > 0, total, torch.ones_like(total))

        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part, target in zip(parts, targets, strict=True):
            images = part.images.to(self.device, non_blocking=True)
            sizes = part.sizes.to(self.device, non_blocking=True)
            images = normalise(images, sizes, config.mean, config.std)
            waits = len(losses) + 1 < len(parts) and world_size() > 1
            with self.network.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=options.amp):
                    loss = self.network(
                        images,
                        target,
                        weight=self.weight,
                        label_smoothing=options.label_smoothing,
                        ignore_index=self.ignore_index,
                        reduction="sum",
                    )
                (loss * share).backward()
            losses.append(loss.detach().float())
        # One exchange for the loss, and so that all processes stop after the same step.
        stop = total.new_tensor(float(self.termination.requested))
        told = gathered(torch.stack([*losses, stop, total]))
        *rows, stops, totals = told.T.tolist()
        self.stopping = any(stops)
        self._check_finite(rows)
        if totals[0] == 0:
            return None  # no mean, and nothing to learn
        if options.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        if self.averaged:
            self.averaged.update(self.model, step)
        return sum(map(sum, rows)) / totals[0]

    def _check_finite(self, losses: list[list[float]]) -> None:
        """Raise FloatingPointError if one of the (passes, processes) losses is not finite."""
        bad = [
            (part, process, loss)
            for part, row in enumerate(losses)
            for process, loss in enumerate(row)
            if not math.isfinite(loss)
        ]
        if not bad:
            return
        options, step = self.options, self.state["step"]
        names = []
        for part, process, _ in bad:
            sampler = TrainSampler(
                len(self.train_set),
                options.batch_size // options.accumulate,
                options.accumulate,
                options.seed,
                self.state["position"],
                process,
                world_size(),
            )
            names += [sample_name(self.train_set, index) for _, index in list(sampler)[part]]
        raise FloatingPointError(
            f"the loss is {bad[0][2]} at step {step}: lower the learning rate (now "
            f"{poly_lr(step, options):g}), add warm-up, or clip gradients; look at the batch, too: "
            f"{', '.join(names)}"
        )

    def _validation_is_due(self) -> bool:
        step, options = self.state["step"], self.options
        every = options.val_every or options.save_every
        due = step == options.steps or (step > 0 and step % every == 0)
        return due and self.state["validated"] != step

    def _validate(self, log: RunLog) -> bool:
        """Whether there was time for a validation; the run is saved in either case."""
        state, kept = self.state, self._kept()
        self._save()
        try:
            self.termination.at_once = True
            if self.termination.requested:
                return False
            result = evaluate(
                kept, self.val_set, progress=False, ignore_index=self.ignore_index, shared=True
            )
        except (Termination.Now, RuntimeError):
            # Another process may be gone already, which the exchange of the counts finds an error.
            if not self.termination.requested:
                raise
            return False
        finally:
            self.termination.at_once = False
        self.model.train()
        state["validated"] = state["step"]
        if result["miou"] > state["best_miou"]:
            state |= {"best_miou": result["miou"], "best_step": state["step"]}
            if self.talks:
                kept.save_pretrained(self.output / "best")
        self._log(log, **{key: result[key] for key in ("miou", "pixel_accuracy", "iou")})
        self._save()
        return True

    def _begin_window(self) -> None:
        self.window = {"steps": 0, "seconds": 0.0, "samples": []}

    def _images_per_second(self) -> float:
        return self.window["steps"] * self.options.batch_size / max(1e-9, self.window["seconds"])

    def _log(self, log: RunLog, **result) -> None:
        """A row about the steps since the last one; loading and learning, but not saving."""
        state, options = self.state, self.options
        row = {
            "step": state["step"],
            "epoch": round(state["step"] * options.batch_size / len(self.train_set), 4),
            "minutes": round((time.perf_counter() - self.started) / 60, 2),
            "lr": poly_lr(max(0, state["step"] - 1), options),
            "loss": state["loss_sum"] / max(1, state["loss_count"]),
        }
        if self.window["steps"]:
            row["images_per_second"] = round(self._images_per_second(), 2)
            made = images_per_second(torch.cat(self.window["samples"]), options.workers)
            row["loader_images_per_second"] = round(made * world_size(), 2)
        log.row(row | result)
        state |= {"loss_sum": 0.0, "loss_count": 0, "logged": state["step"]}
        self._begin_window()

    def _kept(self):
        return self.averaged.model if self.averaged else self.model

    def _save(self) -> None:
        """`last`, and everything that `resume` needs, written whole or not at all.

        The learning rate and all random numbers follow from the options and the step.
        """
        state, now = self.state, (self.state["step"], self.state["validated"])
        if not self.talks or now == self.saved:
            return
        state["seconds"] = time.perf_counter() - self.started
        content = state | {
            "epoch": state["position"][0],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged.model.state_dict() if self.averaged else None,
            "options": dataclasses.asdict(self.options),
        }
        try:
            self._kept().save_pretrained(self.output / "last")
            with replacing(self.state_file) as temporary:
                _write(content, temporary)
        except OSError as error:
            before = "nothing was saved before"
            if self.saved:
                before = f"the save of step {self.saved[0]} is intact: make room and resume from it"
            raise OSError(
                f"cannot save step {state['step']} to {self.output} ({error}); {before}"
            ) from error
        self.saved = now

    def _restore(self) -> None:
        content = torch.load(self.state_file, map_location="cpu", weights_only=True)
        now = dataclasses.asdict(self.options)
        # An option that was not there yet had its default.
        before = dataclasses.asdict(TrainOptions()) | content["options"]
        changed = {k: (before[k], now[k]) for k in now if before[k] != now[k] and k not in MEANS}
        if changed:
            text = ", ".join(f"{k}: {a!r} then, {b!r} now" for k, (a, b) in changed.items())
            raise ValueError(f"the run in {self.output} was started with other options ({text})")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.averaged:
            self.averaged.model.load_state_dict(content["averaged"])
        # Of a run that kept less than this: it saved after validating, at a row of its log.
        step = content["step"]
        done = divmod(step * self.options.batch_size, len(self.train_set))
        self.state |= {"position": done, "validated": step, "logged": step}
        self.state |= {key: content[key] for key in self.state if key in content}


def _write(content: dict, path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            # Else a machine that loses its power may have the new name without the bytes.
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's writer hides the reason in one
        raise OSError(str(error.__context__ or error)) from error


if __name__ == "__main__":
    import sys

    from segmenter_fast.cli import main

    main(["train", *sys.argv[1:]])
