"""Models of the official code and of timm become ours, with the same parameters and numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pretrained import DEPTH, HEADS, PATCH, SIDE, WIDTH, TimmViT, images, shaken
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import segmenter_fast
from segmenter_fast import SegmenterModel, convert, predict, reference
from segmenter_fast.checkpoint import load_checkpoint
from segmenter_fast.conversion import ConversionError
from segmenter_fast.encoder import VisionTransformer

GOLDEN = Path(__file__).parent / "golden"


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


def official_block(width, heads, dropout, drop_path):
    block = nn.Module()
    block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    block.attn, block.mlp = nn.Module(), nn.Module()
    block.attn.heads = heads
    block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    block.attn.attn_drop, block.attn.proj_drop = nn.Dropout(dropout), nn.Dropout(dropout)
    block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    block.mlp.act, block.mlp.drop = nn.GELU(), nn.Dropout(dropout)
    block.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
    return block


class OfficialSegmenter(nn.Module):
    """The official module tree; it computes what the specification says."""

    def __init__(self, config):
        super().__init__()
        self.config, self.n_cls, self.patch_size = config, config.n_cls, config.patch_size
        width = config.d_model
        self.encoder, self.decoder = nn.Module(), nn.Module()
        encoder, decoder = self.encoder, self.decoder
        encoder.patch_embed = nn.Module()
        encoder.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        encoder.patch_embed.image_size = config.image_size
        encoder.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        encoder.dropout = nn.Dropout(config.dropout)
        extra = 1 + config.distilled
        rows, columns = config.grid_size
        if config.distilled:
            encoder.dist_token = nn.Parameter(torch.zeros(1, 1, width))
            encoder.head_dist = nn.Linear(width, 1000)
        encoder.pos_embed = nn.Parameter(torch.zeros(1, extra + rows * columns, width))
        rates = torch.linspace(0, config.drop_path_rate, config.n_layers).tolist()
        encoder.blocks = nn.ModuleList(
            official_block(width, config.n_heads, config.dropout, rate) for rate in rates
        )
        encoder.norm, encoder.head = nn.LayerNorm(width), nn.Linear(width, 1000)
        encoder.pre_logits = nn.Identity()
        if config.decoder == "linear":
            decoder.head = nn.Linear(width, config.n_cls)
            return
        decoder.blocks = nn.ModuleList(
            official_block(width, config.decoder_n_heads, config.decoder_dropout, 0.0)
            for _ in range(config.decoder_n_layers)
        )
        decoder.cls_emb = nn.Parameter(torch.zeros(1, config.n_cls, width))
        decoder.proj_dec = nn.Linear(width, width)
        decoder.proj_patch = nn.Parameter(torch.zeros(width, width))
        decoder.proj_classes = nn.Parameter(torch.zeros(width, width))
        decoder.decoder_norm, decoder.mask_norm = nn.LayerNorm(width), nn.LayerNorm(config.n_cls)

    def forward(self, images):
        return reference.logits(images, dict(self.named_parameters()), self.config)


@pytest.fixture(params=["seg_mask_16", "seg_deit_mask_16", "seg_linear_8"])
def official(request):
    """An official model with golden weights, and what it gives."""
    config, state = load_checkpoint(GOLDEN / request.param)
    model = OfficialSegmenter(config)
    model.load_state_dict(state)
    with np.load(GOLDEN / request.param / "io.npz") as stored:
        return model, {key: torch.from_numpy(stored[key]) for key in stored}


def test_official_segmenter(official):
    theirs, values = official
    ours = convert(theirs.eval())
    assert isinstance(ours, SegmenterModel) and not ours.training
    with torch.inference_mode():
        for i in range(3):
            expected = values[f"logits{i}"]
            error = (ours(values[f"image{i}"]) - expected).abs().max() / expected.abs().max()
            assert error < 1e-4
    expected = theirs.config
    fields = "n_cls image_size patch_size n_layers n_heads distilled decoder drop_path_rate dropout"
    for field in (*fields.split(), "mean", "std"):
        assert getattr(ours.config, field) == pytest.approx(getattr(expected, field)), field
    if expected.decoder != "linear":
        assert ours.config.decoder_n_layers == expected.decoder_n_layers
        assert ours.config.decoder_dropout == pytest.approx(expected.decoder_dropout)


def test_parameters_are_shared(official):
    """An optimiser of the original trains both, and frozen parameters stay frozen."""
    theirs, values = official
    theirs.encoder.cls_token.requires_grad_(False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    ours = convert(theirs.train())
    assert ours.training and all(module.training for module in theirs.modules())
    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == given.keys() and all(mine[name] is given[name] for name in mine)
    assert not ours.encoder.cls_token.requires_grad
    before = [p.detach().clone() for p in theirs.parameters()]
    ours(values["image0"], values["target0"]).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, theirs.parameters(), strict=True))


def test_a_converted_model_saves_and_predicts(official, tmp_path):
    theirs = official[0]
    ours = convert(theirs.eval(), normalization="deit")
    ours.save_pretrained(tmp_path)
    again = SegmenterModel.from_pretrained(tmp_path)
    assert again.config == ours.config and again.config.mean[0] == 0.485
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    assert torch.equal(predict(again, picture), predict(ours, picture))


def test_drop_path_and_dropout_are_theirs():
    config = load_checkpoint(GOLDEN / "seg_mask_16")[0]
    config = config.replace(drop_path_rate=0.3, dropout=0.2, decoder_dropout=0.4)
    theirs = shaken(OfficialSegmenter(config))
    ours = convert(theirs)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in ours.encoder.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.3, config.n_layers).tolist())
    assert ours.encoder.blocks[0].mlp.drop.p == ours.encoder.dropout.p == 0.2
    assert ours.decoder.blocks[0].attn.proj_drop.p == 0.4


# --- timm ----------------------------------------------------------------------------------------


def timm_vit(distilled=False):
    """With the attributes that timm's modules have."""
    model = shaken(TimmViT(distilled))
    model.patch_embed.img_size = (SIDE, SIDE)
    for block in model.blocks:
        block["attn"].num_heads = HEADS
        block.attn, block.mlp = block["attn"], block["mlp"]
    model.forward_features = model.forward
    return model


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm(distilled, dtype):
    theirs = timm_vit(distilled).to(dtype).eval()
    ours = convert(theirs)
    assert isinstance(ours, VisionTransformer) and ours.distilled == distilled
    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == given.keys() and all(mine[name] is given[name] for name in mine)
    with torch.inference_mode():
        x = images().to(dtype)
        tokens = ours(x, return_features=True)
        assert tokens.dtype == dtype
        error = (tokens.float() - theirs(x).float()).abs().max() / theirs(x).float().abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_timm_without_a_classifier():
    theirs = timm_vit()
    theirs.head = nn.Identity()
    ours = convert(theirs)
    assert ours.head.out_features == 1000 and not ours.head.weight.is_meta
    assert ours.head.weight.isfinite().all()


def test_an_encoder_of_timm_in_a_segmenter():
    from segmenter_fast.decoder import DecoderLinear

    encoder = convert(timm_vit())
    model = SegmenterModel(encoder, DecoderLinear(5, PATCH, WIDTH), 5)
    assert model.config.norm_eps == 1e-6 and model.config.n_layers == DEPTH
    target = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    model(images(), target).backward()
    assert encoder.cls_token.grad is not None


def test_the_real_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    ours = convert(theirs)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(x, return_features=True), theirs.forward_features(x), rtol=1e-3, atol=1e-4
        )


# --- What is refused -----------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))


def with_layer_scale(model):
    model.blocks[0].ls1 = Scale()


def with_hook(model):
    model.blocks[1]["mlp"].fc1.register_forward_hook(lambda *_: None)


def with_weight_norm(model):
    weight_norm(model.head)


def with_other_eps(model):
    model.blocks[1]["norm2"].eps = 1e-5


def with_overlapping_patches(model):
    model.patch_embed.proj.stride = (4, 4)


def with_registers(model):
    model.reg_token = nn.Parameter(torch.zeros(1, 4, WIDTH))


def without_class_token(model):
    model.cls_token = None


def with_a_buffer(model):
    model.register_buffer("rope", torch.zeros(3))


def with_dropped_patches(model):
    model.patch_drop = nn.Dropout(0.5)


def with_no_embed_class(model):
    model.no_embed_class = True


def with_wider_mlp(model):
    model.blocks[0]["mlp"].fc1 = nn.Linear(WIDTH, 3 * WIDTH)


def with_other_activation(model):
    model.forward_features = lambda x: F.relu(TimmViT.forward(model, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_layer_scale, r"ours has no: blocks\.0\.ls1\.gamma"),
        (with_hook, r"blocks\.1\.mlp\.fc1 has hooks"),
        (with_weight_norm, "head: parametrised weights"),
        (with_other_eps, "layer norms with different eps"),
        (with_overlapping_patches, "patches that overlap"),
        (with_registers, "ours has no: reg_token"),
        (without_class_token, "no class token"),
        (with_a_buffer, "ours has no: rope"),
        (with_dropped_patches, "patches are dropped in training"),
        (with_no_embed_class, "position embeddings without the class token"),
        (with_wider_mlp, r"other shapes: blocks\.0\.mlp\.fc1\.weight"),
        (with_other_activation, "computes something else"),
    ],
)
def test_other_architectures_are_refused(change, message):
    model = timm_vit()
    change(model)
    with pytest.raises(ConversionError, match=message):
        convert(model)
    assert all(module.training for module in model.modules())


def test_what_is_no_segmenter_is_refused(official):
    with pytest.raises(ConversionError, match="neither an official Segmenter"):
        convert(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match=r"convert its \.module"):
        convert(nn.DataParallel(official[0]))
    with pytest.raises(ValueError, match="normalization must be one of"):
        convert(official[0], normalization="imagenet")
    official[0].decoder = nn.Conv2d(3, 3, 1)
    with pytest.raises(ConversionError, match="neither a linear decoder nor"):
        convert(official[0])


def test_other_numbers_of_a_segmenter_are_refused(official, monkeypatch):
    """Same names and shapes, but the logits are twice as large."""
    real = OfficialSegmenter.forward
    monkeypatch.setattr(OfficialSegmenter, "forward", lambda self, x: 2 * real(self, x))
    with pytest.raises(ConversionError, match="computes something else"):
        convert(official[0])
    assert convert(official[0], check=False) is not None


def test_convert_is_public():
    assert segmenter_fast.convert is convert
