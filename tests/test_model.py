"""SegmenterModel: construction, shapes, initialisation, training behaviour, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from segmenter_fast import (
    BackendError,
    PatchLogits,
    SegmenterModel,
    create_model,
    list_variants,
    reference,
)
from segmenter_fast.blocks import DropPath
from segmenter_fast.decoder import DecoderLinear, MaskTransformer
from segmenter_fast.encoder import VisionTransformer
from segmenter_fast.variants import VARIANTS, create_config


def tiny(decoder="mask_transformer", distilled=False, patch=8, n_cls=5, **changes):
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=(32, 48), patch_size=patch, n_layers=2, d_model=64, d_ff=128, n_heads=2,
        n_cls=10, dropout=changes.get("dropout", 0.0), drop_path_rate=changes.get("drop_path", 0.0),
        distilled=distilled,
    )  # fmt: skip
    if decoder == "linear":
        head = DecoderLinear(n_cls, patch, 64)
    else:
        head = MaskTransformer(n_cls, patch, 64, 2, 1, 64, 128, 0.0, changes.get("dropout", 0.0))
    return SegmenterModel(encoder, head, n_cls, backend=changes.get("backend", "auto"))


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (8, 8), (5, 70)])
def test_every_consumer_has_the_image_size(decoder, distilled, patch, size):
    model = tiny(decoder, distilled, patch).eval()
    images = torch.randn(2, 3, *size)
    target = torch.randint(0, 5, (2, *size), dtype=torch.uint8)
    with torch.inference_mode():
        assert model(images).shape == (2, 5, *size)
        assert model.labels(images).shape == (2, *size)
        assert model.labels(images).dtype == torch.uint8
        assert model(images, target).shape == ()
        answer = model.patch_logits(images)
    assert isinstance(answer, PatchLogits)
    rows, columns = -(-size[0] // patch), -(-size[1] // patch)
    assert answer.logits().shape == (2, 5, *size)
    assert answer.grid_size == (rows, columns)


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize("distilled", [False, True])
def test_matches_specification(decoder, distilled):
    model = tiny(decoder, distilled).eval()
    images = torch.randn(2, 3, 41, 70)
    state = model.state_dict()
    with torch.inference_mode():
        expected = reference.logits(images, state, model.config)
        for backend in ("reference", "native"):
            model.backend = backend
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_zero_after_normalisation():
    """The rows that padding adds act as rows of the mean colour, not as black pixels."""
    model = tiny().eval()
    image = torch.randn(1, 3, 30, 44)
    padded = torch.zeros(1, 3, 32, 48)
    padded[:, :, :30, :44] = image
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(padded)[:, :, :30, :44])


def test_position_embeddings_resample_by_token_count():
    """Another grid with as many tokens takes the embeddings as they are, as officially."""
    model = tiny().eval()  # trained grid 4 x 6
    encoder = model.encoder
    same_count = encoder._tokens(torch.zeros(1, 3, 8 * 3, 8 * 8))
    content = encoder.patch_embed(torch.zeros(1, 3, 24, 64))
    torch.testing.assert_close(same_count[:, 1:] - content, encoder.pos_embed[:, 1:])
    other = encoder._tokens(torch.zeros(1, 3, 8 * 8, 8 * 12))
    assert other.shape == (1, 1 + 96, 64)


def test_labels_are_the_argmax_of_forward():
    model = tiny(n_cls=40).eval()
    images = torch.randn(2, 3, 50, 61)
    with torch.inference_mode():
        logits = model(images)
        labels = model.labels(images).long()
    chosen = logits.gather(1, labels[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 1e-5 * logits.abs().max()


def test_initialisation():
    """Each parameter's distribution, on a model large enough to measure it."""
    torch.manual_seed(0)
    model = create_model("Seg-T-Mask/16", num_classes=150, image_size=512)
    unit = {"decoder.proj_patch", "decoder.proj_classes"}
    seen = set()
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
            seen.add("norm")
        elif name == "encoder.patch_embed.proj.bias" or name == "encoder.patch_embed.proj.weight":
            # PyTorch's convolution default, which the official code leaves alone: uniform in
            # +-1 / sqrt(fan in).
            bound = (3 * 16 * 16) ** -0.5
            assert p.abs().max() <= bound, name
            assert abs(p.std().item() / (bound / 3**0.5) - 1) < 0.1, name
            seen.add("convolution")
        elif name.endswith("bias"):
            assert (p == 0).all(), name
            seen.add("bias")
        else:
            std = 192**-0.5 if name in unit else 0.02
            n = p.numel()
            assert abs(p.mean()) < 5 * std / n**0.5, name
            assert abs(p.std() / std - 1) < 5 / (2 * n) ** 0.5 + 1e-3, name
            # Normal: 68.27 % within one standard deviation, and tails beyond two.
            inside = (p.abs() < std).double().mean().item()
            assert abs(inside - 0.6827) < 5 * (0.25 / n) ** 0.5, name
            seen.add("unit" if name in unit else "normal")
    assert seen == {"norm", "convolution", "bias", "normal", "unit"}


def test_no_weight_decay():
    names = {"encoder.pos_embed", "encoder.cls_token", "encoder.dist_token", "decoder.cls_emb"}
    assert tiny().no_weight_decay() == names
    assert tiny("linear").no_weight_decay() == names - {"decoder.cls_emb"}


@pytest.mark.parametrize(
    "name", ["Seg-N-Mask/8", "Seg-T/16", "Seg-T-Mask/16", "Seg-T-DeiT-Mask/16"]
)
def test_create_model(name):
    model = create_model(name, num_classes=7, image_size=64, drop_path_rate=0.2)
    variant = VARIANTS[name]
    assert model.training and model.config.variant == name
    assert len(model.encoder.blocks) == variant.backbone.n_layers
    assert model.encoder.distilled == variant.distilled
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.encoder.blocks][-1] == 0.2
    if variant.decoder == "mask_transformer":
        assert model.decoder.blocks[0].attn.attn_drop.p == 0.1
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7, 64, 64)


def test_every_variant_has_its_published_size():
    """Millions of parameters of the paper's table, without the 1000-way head."""
    published = {"T": 7, "S": 27, "B": 106, "L": 334}
    for size, millions in published.items():
        config = create_config(f"Seg-{size}-Mask/16", 150, 640 if size == "L" else 512)
        d, layers = config.d_model, config.n_layers + config.decoder_n_layers
        count = layers * (12 * d * d + 13 * d) + 3 * d * d + 3 * 256 * d
        count += (config.grid_size[0] * config.grid_size[1] + 2 + 150) * d
        assert abs(count / 1e6 - millions) < 0.04 * millions + 0.5, (size, count)
    assert {f"Seg-{s}{m}/{p}" for s in "TSBL" for m in ("", "-Mask") for p in (8, 16, 32)} <= set(
        list_variants()
    )


def test_parameter_count_formula_is_the_model():
    config = create_config("Seg-T-Mask/16", 150, 512)
    model = create_model("Seg-T-Mask/16", 150, 512)
    d, layers = 192, 14
    count = layers * (12 * d * d + 13 * d) + 3 * d * d + 3 * 256 * d + (1024 + 2 + 150) * d
    actual = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoder.head"))
    assert abs(actual / count - 1) < 0.01
    assert config == model.config


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_dropout_and_stochastic_depth_are_random_in_training_only(backend):
    model = tiny(dropout=0.3, drop_path=0.3, backend=backend)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_dropout_in_attention_keeps_the_mean():
    """Both attention paths drop weights after the softmax and scale what stays."""
    from segmenter_fast.ops.attention import attention

    torch.manual_seed(0)
    qkv = torch.randn(1, 9, 3, 2, 8, dtype=torch.float64)
    expected = attention(qkv, backend="reference")
    for backend in ("reference", "native"):
        draws = torch.stack([attention(qkv, dropout_p=0.4, backend=backend) for _ in range(4000)])
        error = (draws.mean(0) - expected).abs()
        assert (error < 6 * draws.std(0) / 4000**0.5).all(), backend
        assert draws.std(0).min() > 0, backend


def test_drop_path():
    x = torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    y = DropPath(0.25)(x)
    per_sample = y.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 1 / 0.75).all(1)).all()
    assert abs(y.mean().item() - 1) < 0.05
    assert DropPath(0.25).eval()(x) is x


def test_stochastic_depth_rises_linearly():
    model = create_model("Seg-T/16", 3, 32, drop_path_rate=0.11)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.encoder.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_loss_options_reach_cross_entropy():
    model = tiny().eval()
    images = torch.randn(2, 3, 32, 48)
    target = torch.randint(0, 5, (2, 32, 48))
    target[0, :5] = 9
    options = {"weight": torch.rand(5) + 0.1, "label_smoothing": 0.2, "ignore_index": 9}
    expected = torch.nn.functional.cross_entropy(model(images), target, **options)
    torch.testing.assert_close(model(images, target, **options), expected)
    per_pixel = model.loss(images, target, ignore_index=9, reduction="none")
    assert per_pixel.shape == (2, 32, 48)


def test_twenty_steps_reduce_the_loss_alike():
    """Training through `forward`; the reference and the native path follow the same curve."""
    curves = []
    torch.manual_seed(1)
    images, target = torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))
    for backend in ("reference", "native"):
        model = tiny(backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(images, target)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.97 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)


def test_copy_pickle_and_state_dict():
    model = tiny().eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
            assert other.backend == model.backend and other.config == model.config


def test_custom_encoder():
    """Anything with the official encoder's attributes fits; there is no config to save then."""

    class Flat(nn.Module):
        patch_size, distilled = 4, False

        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, 8, 4, 4)

        def forward(self, im, return_features=False):
            x = self.proj(im).flatten(2).transpose(1, 2)
            return torch.cat((x.mean(1, keepdim=True), x), 1)

    model = SegmenterModel(Flat(), DecoderLinear(3, 4, 8), 3)
    assert model(torch.randn(1, 3, 10, 9)).shape == (1, 3, 10, 9)
    assert model.config is None


@pytest.mark.parametrize("target", [False, True])
def test_compile_fullgraph(target):
    model = tiny().eval()
    images = torch.randn(1, 3, 33, 47)
    arguments = (images, torch.randint(0, 5, (1, 33, 47))) if target else (images,)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_compiled_for_sides_that_vary():
    """From the second size on PyTorch traces sides as symbols, padding included."""
    torch.compiler.reset()
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((32, 48), (48, 32), (33, 47), (50, 61)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(images), model(images))


def test_distributed_data_parallel(tmp_path):
    """The wrapper sees training, because the loss comes out of `forward`.

    The classification head of the pretrained encoder takes no part, hence find_unused_parameters,
    as in the official trainer.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        images, target = torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))
        for _ in range(2):
            wrapped(images, target).backward()
        unused = {name for name, p in model.named_parameters() if p.grad is None}
        assert unused == {"encoder.head.weight", "encoder.head.bias"}
    finally:
        dist.destroy_process_group()


def test_export():
    model = tiny().eval()
    images = torch.randn(1, 3, 32, 48)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_autocast():
    model = tiny().eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low = model(images)
        labels = model.labels(images)
    with torch.inference_mode():
        full = model(images)
    assert (low.float() - full).abs().max() < 0.1 * full.abs().max()
    assert labels.shape == (1, 32, 48)


def test_backend_reaches_every_layer():
    model = tiny(backend="reference")
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}
    model.backend = "native"
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"native"}


def test_rejects_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 32, 48\)"):
        model(torch.randn(3, 32, 48))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 32, 48\)"):
        model.labels(torch.randn(1, 4, 32, 48))
    with pytest.raises(TypeError, match=r"floating point.*uint8"):
        model(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"torch.Tensor, got list"):
        model([1, 2])
    with pytest.raises(ValueError, match="no pixels"):
        model(torch.randn(1, 3, 0, 48))
    with pytest.raises(ValueError, match="images are on meta and the model on cpu"):
        model(torch.randn(1, 3, 32, 48, device="meta"))
    with pytest.raises(ValueError, match=r"label 7|7"):
        model(torch.randn(1, 3, 32, 48), torch.full((1, 32, 48), 7))
    with pytest.raises(TypeError, match=r"\['ignore_index'\] need a target"):
        model(torch.randn(1, 3, 32, 48), ignore_index=3)
    with pytest.raises(ValueError, match="backend must be one of"):
        model.backend = "cuda"
    with pytest.raises(BackendError, match="runs on a GPU"):
        tiny(backend="triton")(torch.randn(1, 3, 32, 48))
    with pytest.raises(ValueError, match=r"layer_id must be in \[0, 2\), got 2"):
        model.get_attention_map_enc(torch.randn(1, 3, 32, 48), 2)
    with pytest.raises(ValueError, match="has no attention"):
        tiny("linear").get_attention_map_dec(torch.randn(1, 3, 32, 48), 0)
    with pytest.raises(ValueError, match="did you mean Seg-B-Mask/16"):
        create_model("Seg-B-Mask-16")
    with pytest.raises(ValueError, match="divisible by patch_size"):
        VisionTransformer((30, 32), 8, 1, 64, 64, 1, 3)
