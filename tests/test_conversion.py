"""Models of the official code and of timm become ours, with the same parameters and numbers.

The two families are rebuilt here from their public structure, with their names and their own
forward passes, so that whatever is exchanged in a module changes what the model computes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import segmenter_fast
from segmenter_fast import SegmenterModel, convert, predict
from segmenter_fast.checkpoint import load_checkpoint
from segmenter_fast.conversion import ConversionError
from segmenter_fast.decoder import DecoderLinear
from segmenter_fast.encoder import VisionTransformer, resize_pos_embed

GOLDEN = Path(__file__).parent / "golden"
WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 3, 2, 8, 32


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, width, heads, dropout, drop_path, eps=1e-5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads, dropout), FeedForward(width, dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """What the official encoder and timm's have in common."""

    def __init__(self, blocks, width, patch, grid, distilled, classes, eps):
        super().__init__()
        self.patch_embed, self.grid = PatchEmbed(width, patch), grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
            self.head_dist = nn.Linear(width, classes)
        tokens = 1 + distilled + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width, eps), nn.Linear(width, classes)

    def tokens(self, images):
        x, patch = self.patch_embed(images), self.patch_embed.proj.kernel_size[0]
        extra = [self.cls_token, *([self.dist_token] if hasattr(self, "dist_token") else [])]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in extra), x], dim=1)
        pos_embed, grid = self.pos_embed, tuple(side // patch for side in images.shape[2:])
        if pos_embed.shape[1] != x.shape[1]:
            pos_embed = resize_pos_embed(pos_embed, self.grid, grid, len(extra))
        x = x + pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def classes(self, x):
        if hasattr(self, "dist_token"):
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])


class OfficialEncoder(Encoder):
    def __init__(self, config):
        rates = torch.linspace(0, config.drop_path_rate, config.n_layers).tolist()
        width, heads = config.d_model, config.n_heads
        blocks = [Block(width, heads, config.dropout, rate) for rate in rates]
        grid = config.grid_size
        super().__init__(blocks, width, config.patch_size, grid, config.distilled, 1000, 1e-5)
        self.patch_embed.image_size = config.image_size
        self.dropout, self.pre_logits = nn.Dropout(config.dropout), nn.Identity()

    def forward(self, images, return_features=False):
        x = self.tokens(images)
        return x if return_features else self.classes(x)


class LinearDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = nn.Linear(config.d_model, config.n_cls)

    def forward(self, x):
        return self.head(x)


class MaskDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, heads = config.d_model, config.decoder_n_heads
        self.blocks = nn.ModuleList(
            Block(width, heads, config.decoder_dropout, 0.0) for _ in range(config.decoder_n_layers)
        )
        self.cls_emb = nn.Parameter(torch.zeros(1, config.n_cls, width))
        self.proj_dec = nn.Linear(width, width)
        self.proj_patch = nn.Parameter(torch.zeros(width, width))
        self.proj_classes = nn.Parameter(torch.zeros(width, width))
        self.decoder_norm, self.mask_norm = nn.LayerNorm(width), nn.LayerNorm(config.n_cls)

    def forward(self, x):
        n_cls = self.cls_emb.shape[1]
        x = torch.cat((self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches = F.normalize(x[:, :-n_cls] @ self.proj_patch, dim=-1)
        classes = F.normalize(x[:, -n_cls:] @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.mT)


class OfficialSegmenter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.n_cls, self.patch_size = config, config.n_cls, config.patch_size
        self.encoder = OfficialEncoder(config)
        self.decoder = (LinearDecoder if config.decoder == "linear" else MaskDecoder)(config)

    def forward(self, images):
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.encoder(images, return_features=True)[:, 1 + self.config.distilled :]
        rows = images.shape[2] // self.patch_size
        masks = self.decoder(x).unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        return F.interpolate(masks, images.shape[2:], mode="bilinear")[:, :, :height, :width]


class TimmViT(Encoder):
    def __init__(self, distilled=False):
        blocks = [Block(WIDTH, HEADS, 0.0, 0.0, eps=1e-6) for _ in range(DEPTH)]
        grid = (SIDE // PATCH, SIDE // PATCH)
        super().__init__(blocks, WIDTH, PATCH, grid, distilled, 7, 1e-6)
        self.patch_embed.img_size = (SIDE, SIDE)
        self.global_pool, self.no_embed_class, self.norm_pre = "token", False, nn.Identity()
        self.pos_drop, self.patch_drop, self.head_drop = nn.Dropout(0), nn.Identity(), nn.Dropout(0)
        for block in self.blocks:
            block.attn.num_heads = block.attn.__dict__["heads"]
            block.mlp.drop1, block.mlp.drop2 = nn.Dropout(0.0), nn.Dropout(0.0)
            block.ls1, block.ls2 = nn.Identity(), nn.Identity()

    def forward_features(self, images):
        return self.tokens(self.norm_pre(images))

    def forward(self, images):
        return self.classes(self.forward_features(images))


def shaken(module):
    """Parameters away from the zeros and ones that they are initialised with."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def timm_vit(distilled=False):
    return shaken(TimmViT(distilled))


def images(size=SIDE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def official_model(name="seg_mask_16"):
    config, state = load_checkpoint(GOLDEN / name)
    model = OfficialSegmenter(config)
    model.load_state_dict(state)
    return model


@pytest.fixture(params=["seg_mask_16", "seg_deit_mask_16", "seg_linear_8"])
def official(request):
    """An official model with golden weights, and what it gives."""
    model = official_model(request.param)
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
        for got, expected in ((tokens, theirs.forward_features(x)), (ours(x), theirs(x))):
            error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_timm_without_a_classifier():
    theirs = timm_vit()
    theirs.head = nn.Identity()
    ours = convert(theirs)
    assert ours.head.out_features == 1000 and not ours.head.weight.is_meta
    assert ours.head.weight.isfinite().all()


def test_an_encoder_of_timm_in_a_segmenter():
    encoder = convert(timm_vit())
    model = SegmenterModel(encoder, DecoderLinear(5, PATCH, WIDTH), 5)
    assert model.config.norm_eps == 1e-6 and model.config.n_layers == DEPTH
    target = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    model(images(), target).backward()
    assert encoder.cls_token.grad is not None


def test_normalization_reaches_the_config_of_a_segmenter():
    """By name, from timm's description of the weights, else by family."""

    def mean(theirs, normalization=None):
        encoder = convert(theirs, normalization, check=False)
        return SegmenterModel(encoder, DecoderLinear(5, PATCH, WIDTH), 5).config.mean

    described = timm_vit()
    described.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert mean(described) == (0.1, 0.2, 0.3)
    assert mean(described, "vit") == mean(timm_vit()) == (0.5, 0.5, 0.5)
    assert mean(timm_vit(), "deit") == mean(timm_vit(distilled=True)) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("make", [lambda: timm_vit().train(), lambda: official_model().train()])
def test_every_module_keeps_its_mode(make):
    theirs = make()
    encoder = getattr(theirs, "encoder", theirs)
    encoder.blocks[0].eval()
    ours = convert(theirs)
    converted = getattr(ours, "encoder", ours)
    for blocks in (encoder.blocks, converted.blocks):
        assert not any(module.training for module in blocks[0].modules())
        assert all(module.training for module in blocks[1].modules())
    assert ours.training and theirs.training


def test_gradient_checkpointing_is_kept():
    theirs = timm_vit()
    theirs.grad_checkpointing = True
    assert all(block.recompute for block in convert(theirs).blocks)
    assert not any(block.recompute for block in convert(timm_vit()).blocks)


def test_conversion_leaves_the_numbers_and_the_randomness_alone():
    """The comparison draws weights of its own: the model's stay, and so does what comes next."""
    theirs = timm_vit()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(theirs)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_real_timm(name):
    timm = pytest.importorskip("timm")
    theirs = shaken(timm.create_model(name, pretrained=False, depth=3)).eval()
    ours = convert(theirs)
    assert ours.normalization == (theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
    x = images(224)
    with torch.inference_mode():
        for got, expected in (
            (ours(x, return_features=True), theirs.forward_features(x)),
            (ours(x), theirs(x)),
        ):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_values": 1.0}, r"ours has no: blocks\.0\.ls1\.gamma"),
        ({"qk_norm": True}, r"ours has no: blocks\.0\.attn\.q_norm"),
        ({"class_token": False, "global_pool": "avg", "num_classes": 0}, "no class token"),
        ({"reg_tokens": 4}, "ours has no: reg_token"),
        ({"no_embed_class": True}, "no_embed_class"),
        ({"pre_norm": True}, "ours has no: norm_pre"),
        ({"global_pool": "avg"}, "ours has no: fc_norm"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg'"),
        ({"qkv_bias": False}, r"theirs has no: blocks\.0\.attn\.qkv\.bias"),
        ({"mlp_ratio": 3}, r"other shapes: blocks\.0\.mlp\.fc1\.weight"),
        ({"drop_rate": 0.1}, "head_drop"),
        ({"patch_drop_rate": 0.1}, "patches are dropped"),
        ({"act_layer": nn.SiLU}, r"blocks\.0\.mlp\.act, SiLU"),
        ({"act_layer": "gelu_tanh"}, r"blocks\.0\.mlp\.act, GELUTanh"),
    ],
    ids=str,
)
def test_options_of_the_real_timm_are_refused(options, message):
    timm = pytest.importorskip("timm")
    small = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS}
    with pytest.raises(ConversionError, match=message):
        convert(timm.models.VisionTransformer(**small, depth=2, **({"num_classes": 3} | options)))


# --- What is refused -----------------------------------------------------------------------------


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))


class LowRank(nn.Module):
    """An adapter around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)


class Noisy(nn.Linear):
    """In evaluation mode a linear layer, in training more than that."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x) * self.training)


class PostNorm(Block):
    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64)
        self.act, self.fc2 = nn.SiLU(), nn.Linear(64, WIDTH)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bands", torch.zeros(3), persistent=False)


def put(path, make):
    """A change: `make(what is there)` at `path`, a module, parameter or attribute."""

    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name, None)))

    return change


def with_hook(model):
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)


def with_weight_norm(model):
    weight_norm(model.head)


def without_layer_norms(model):
    for path in ("norm", *(f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2))):
        put(path, lambda _: nn.RMSNorm(WIDTH))(model)


def with_twice_the_attention(model):
    for block in model.blocks:
        block.attn.scale *= 2


REFUSED = {
    "layer scale": (put("blocks.0.ls1", lambda _: LayerScale()), r"no: blocks\.0\.ls1\.gamma"),
    "query norm": (
        put("blocks.0.attn.q_norm", lambda _: nn.LayerNorm(8, 1e-6)),
        r"no: blocks\.0\.attn\.q_norm\.weight",
    ),
    "registers": (put("reg_token", lambda _: nn.Parameter(torch.zeros(1, 4, WIDTH))), "reg_token"),
    "class token": (put("cls_token", lambda _: None), "no class token"),
    "no_embed_class": (put("no_embed_class", lambda _: True), "without the class token"),
    "rotary": (put("rope", lambda _: Rotary()), r"ours has no: rope\.bands"),
    "swiglu": (put("blocks.1.mlp", lambda _: SwiGLU()), r"ours has no: blocks\.1\.mlp\.fc1_g"),
    "pre-norm": (put("norm_pre", lambda _: nn.LayerNorm(WIDTH, 1e-6)), r"no: norm_pre\.weight"),
    "fc_norm": (put("fc_norm", lambda _: nn.LayerNorm(WIDTH, 1e-6)), r"no: fc_norm\.weight"),
    "pooling": (put("global_pool", lambda _: "avg"), "global_pool='avg'"),
    "eps": (put("blocks.1.norm2.eps", lambda _: 1e-5), "layer norms of one eps are needed"),
    "rms norm": (without_layer_norms, "no nn.LayerNorm"),
    "hook": (with_hook, r"blocks\.1\.mlp\.fc1 has hooks"),
    "weight norm": (with_weight_norm, "head: parametrised weights"),
    "adapter": (put("blocks.0.attn.qkv", LowRank), r"no: blocks\.0\.attn\.qkv\.base_layer"),
    "own linear": (
        put("blocks.0.attn.proj", lambda _: Noisy(WIDTH, WIDTH)),
        r"blocks\.0\.attn\.proj is a Noisy",
    ),
    "own forward": (
        put("blocks.0.forward", lambda _: lambda x: x),
        r"blocks\.0 has had its forward replaced",
    ),
    "overlapping patches": (put("patch_embed.proj.stride", lambda _: (4, 4)), "overlap"),
    "no image size": (put("patch_embed.img_size", lambda _: None), "for which image size"),
    "no heads": (put("blocks.1.attn.num_heads", lambda _: 1), "one attention of a known number"),
    "mlp ratio": (
        put("blocks.0.mlp.fc1", lambda _: nn.Linear(WIDTH, 3 * WIDTH)),
        r"other shapes: blocks\.0\.mlp\.fc1\.weight",
    ),
    "no bias": (
        put("blocks.0.attn.qkv.bias", lambda _: None),
        r"theirs has no: blocks\.0\.attn\.qkv\.bias",
    ),
    "dropped patches": (put("patch_drop", lambda _: nn.Dropout(0.5)), "patches are dropped"),
    "head dropout": (put("head_drop", lambda _: nn.Dropout(0.5)), "head_drop"),
    "uneven dropout": (
        put("blocks.0.mlp.drop1", lambda _: nn.Dropout(0.5)),
        "different rates of dropout in FeedForward",
    ),
    "other dropout": (put("pos_drop", lambda _: nn.Dropout2d(0.5)), "not a plain dropout"),
    "activation": (put("blocks.1.mlp.act", lambda _: nn.SiLU()), r"blocks\.1\.mlp\.act, SiLU"),
    "tanh": (
        put("blocks.1.mlp.act", lambda _: nn.GELU(approximate="tanh")),
        r"blocks\.1\.mlp\.act, GELU\(approximate='tanh'\)",
    ),
    "scale": (with_twice_the_attention, r"attn\.scale 0\.7071\d* where ours is 0\.3535"),
    "post-norm": (
        put("blocks.0", lambda _: PostNorm(WIDTH, HEADS, 0.0, 0.0, 1e-6)),
        "computes something else .* order of operations in PostNorm",
    ),
}


# Weights as they are initialised, in 16 bits, are where a comparison of the models as they are
# would see the least.
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh bfloat16"])
@pytest.mark.parametrize("what", REFUSED)
def test_other_architectures_are_refused(what, fresh):
    model = TimmViT().to(torch.bfloat16) if fresh else timm_vit()
    change, message = REFUSED[what]
    change(model)
    with pytest.raises(ConversionError, match=message):
        convert(model)
    assert all(module.training for module in model.modules())


def test_a_mixed_stochastic_depth_is_refused(official):
    block = official[0].encoder.blocks[1]
    block.drop_path = DropPath(0.1)
    block.drop_path.scale_by_keep = False
    with pytest.raises(ConversionError, match="scale_by_keep"):
        convert(official[0])
    del block.drop_path
    block.drop_path1, block.drop_path2 = DropPath(0.1), DropPath(0.2)
    with pytest.raises(ConversionError, match="different stochastic depth"):
        convert(official[0], check=False)


def test_what_is_no_segmenter_is_refused(official):
    with pytest.raises(ConversionError, match="neither an official Segmenter"):
        convert(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match=r"DataParallel wraps a model: convert its \.module"):
        convert(nn.DataParallel(official[0]))
    with pytest.raises(ConversionError, match=r"convert its \._orig_mod"):
        convert(torch.compile(official[0]))
    with pytest.raises(ConversionError, match="segmenter_fast's already"):
        convert(convert(official[0]))
    with pytest.raises(ValueError, match="normalization must be one of"):
        convert(timm_vit(), normalization="imagenet")
    with pytest.raises(ValueError, match="backend"):
        convert(timm_vit(), backend="cuda")
    official[0].decoder = nn.Conv2d(3, 3, 1)
    with pytest.raises(ConversionError, match="neither a linear decoder nor"):
        convert(official[0])
    official[0].encoder = nn.Conv2d(3, 3, 1)
    with pytest.raises(ConversionError, match="the encoder Conv2d is not a ViT"):
        convert(official[0])


def test_distributed_data_parallel_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ConversionError, match=r"convert its \.module"):
            convert(DistributedDataParallel(timm_vit()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_other_numbers_of_a_segmenter_are_refused(part):
    """Same names and shapes in either half, but another activation."""
    theirs = official_model()
    getattr(theirs, part).blocks[0].mlp.act = nn.GELU(approximate="tanh")
    with pytest.raises(ConversionError, match=rf"{part}\.blocks\.0\.mlp\.act, GELU\("):
        convert(theirs)
    assert convert(theirs, check=False) is not None


def test_convert_is_public():
    assert segmenter_fast.convert is convert
