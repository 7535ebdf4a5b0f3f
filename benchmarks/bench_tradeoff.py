"""Images per second of the small models whose mIoU on procedural scenes is known.

`segmenter-fast tradeoff` times all models of the paper and draws the figure; this is the part of it
that takes seconds. The official algorithm in eager PyTorch is the peer, as in bench_model.py.
"""

import pytest
import torch
from bench_model import model_work
from checks import assert_labels

from segmenter_fast import reference, tradeoff
from segmenter_fast.data import Scenes
from segmenter_fast.data.augment import normalise
from segmenter_fast.variants import create_model_from_config

TASKS = {task.name: task for task in tradeoff.small_tasks(["float32"])}


@pytest.mark.parametrize("name", TASKS)
def test_small_models(contest, name):
    task, batch = TASKS[name], 8
    torch.manual_seed(0)
    model = create_model_from_config(task.config).eval()
    state, config = model.state_dict(), task.config
    scenes = Scenes(batch, size=config.image_size, split="val")
    images = torch.stack([scenes[i][0] for i in range(batch)])
    sizes = torch.tensor([config.image_size] * batch)
    x = normalise(images, sizes, config.mean, config.std)

    @torch.inference_mode()
    def official():
        return reference.labels(x, state, config)

    @torch.inference_mode()
    def ours():
        return model.labels(x)

    with torch.inference_mode():
        patch_logits = reference.patch_logits(x, state, config)

    def check(name: str, labels: torch.Tensor) -> None:
        with torch.inference_mode():
            slack = 4 * float((model.patch_logits(x).grid - patch_logits).abs().max())
        assert slack < 1e-3 * float(patch_logits.abs().max()), f"{name}: encoders differ by {slack}"
        assert_labels(labels, patch_logits, config.image_size, slack=slack)

    # A linear decoder has no blocks, and its one product is less than the mask transformer's three.
    mask = config.decoder == "mask_transformer"
    counted = config if mask else config.replace(decoder_n_layers=0)
    contest(
        f"{name}, {config.image_size[0]} x {config.image_size[1]}, batch {batch}, "
        f"mIoU {task.miou:.1f} on scenes",
        {"official algorithm, eager": official, "segmenter_fast": ours},
        check,
        rounds=7,
        work=model_work(counted, sum(p.numel() for p in model.parameters()), batch),
    )
