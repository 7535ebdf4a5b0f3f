"""One training step of Seg-T-Mask/16: batch 2, 512 x 512, K = 150; loss, backward, SGD.

All contestants train the same parameters, in evaluation mode (no dropout, whose draws would differ)
and with a learning rate of 0, so that each step is the same step. The official algorithm is
`reference.loss`: attention weights written out and logits upsampled to B x 150 x 512 x 512 floats.
"""

import torch
import torch.nn.functional as F
from bench_model import images, model_work
from bench_upsample_cross_entropy import make_target
from harness import Work
from peers.engines import plain

from segmenter_fast import create_model, reference

BATCH, SIZE = 2, (512, 512)


def test_training_step(contest, compiled):
    torch.manual_seed(0)
    model = create_model("Seg-T-Mask/16", num_classes=150, image_size=SIZE).eval()
    # What the loss does not depend on is no part of a step: the classifier that weights carry.
    model.encoder.head.requires_grad_(False)
    config, x, target = model.config, images(BATCH), make_target("regions", 150)
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0, momentum=0.9, nesterov=True)

    peer = plain(model, share=True)

    def full_size(images, target):
        return F.cross_entropy(peer(images), target, ignore_index=255)

    def step_of(loss_of, recompute: bool = False):
        def step() -> dict[str, torch.Tensor]:
            model.recompute = recompute
            loss = loss_of()
            loss.backward()
            optimizer.step()
            result = {"loss": loss.detach()}
            result |= {name: p.grad for name, p in trained.items()}
            optimizer.zero_grad(set_to_none=True)
            return result

        return step

    contestants = {
        "official algorithm, eager": step_of(lambda: reference.loss(x, target, parameters, config)),
        "full-size loss, fused attention": step_of(lambda: full_size(x, target)),
        "the same, torch.compile": step_of(compiled(full_size, x, target)),
        "segmenter_fast, recompute": step_of(lambda: model(x, target), recompute=True),
        "segmenter_fast": step_of(lambda: model(x, target)),
    }
    first: dict[str, torch.Tensor] = {}

    def check(name: str, result: dict[str, torch.Tensor]) -> None:
        # The first contestant is the definition; float32 gradients of 14 layers differ by rounding.
        if not first:
            first.update({key: value.clone() for key, value in result.items()})
        for key, expected in first.items():
            error = float((result[key] - expected).abs().max())
            scale = float(expected.abs().max())
            assert error <= 2e-3 * scale + 1e-7, f"{name}: {key} differs by {error} of {scale}"

    forward = model_work(config, sum(p.numel() for p in trained.values()), BATCH)
    contest(
        "Seg-T-Mask/16, one training step, 512 x 512, batch 2, K = 150",
        contestants,
        check,
        rounds=9,
        peers=3,
        # Backward multiplies twice what forward does: by the weights and by the inputs. Parameters,
        # gradients and momentum are read and written.
        work=Work(3 * forward.flops, 5 * forward.bytes),
    )
