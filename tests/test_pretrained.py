"""Starting from other weights: every layout, every refit, and everything that does not fit."""

import argparse
import io
import json
import logging
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from segmenter_fast import CheckpointError, SegmenterModel, create_model, load_pretrained
from segmenter_fast.cli import _starting_model, app
from segmenter_fast.config import NORMALIZATION
from segmenter_fast.foreign import read_weights
from segmenter_fast.pretrained import load_whole, resize_filters

WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 3, 2, 8, 32
FIELDS = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": DEPTH, "decoder_n_layers": 1}


def tiny(variant="Seg-N-Mask/8", n_cls=5, size=SIDE, seed=0, **changes):
    torch.manual_seed(seed)
    return create_model(variant, n_cls, size, **(FIELDS | changes)).eval()


def images(size=SIDE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def shaken(module):
    """Norms and biases away from the ones and zeros that they are initialised with."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# --- Other libraries, each against a forward pass by its own conventions -------------------------


class TimmViT(nn.Module):
    """ViT with timm's names."""

    def __init__(self, distilled=False):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.extra = [self.cls_token]
        if distilled:
            self.dist_token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.head_dist = nn.Linear(WIDTH, 7)
            self.extra.append(self.dist_token)
        tokens = len(self.extra) + (SIDE // PATCH) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, WIDTH))
        self.blocks = nn.ModuleList(self.block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 7)

    def block(self):
        block = nn.ModuleDict({"norm1": nn.LayerNorm(WIDTH, 1e-6), "attn": nn.Module()})
        block["attn"].qkv, block["attn"].proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        block["norm2"], block["mlp"] = nn.LayerNorm(WIDTH, 1e-6), nn.Module()
        block["mlp"].fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        block["mlp"].fc2 = nn.Linear(4 * WIDTH, WIDTH)
        return block

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in self.extra), x], 1) + self.pos_embed
        for block in self.blocks:
            y = block["attn"].qkv(block["norm1"](x)).unflatten(-1, (3, HEADS, -1))
            q, k, v = y.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["attn"].proj(y)
            x = x + block["mlp"].fc2(F.gelu(block["mlp"].fc1(block["norm2"](x))))
        return self.norm(x)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("file", ["vit.pth", "vit.safetensors", "nested.pth"])
def test_timm(tmp_path, file, distilled):
    theirs, path = shaken(TimmViT(distilled)), tmp_path / file
    state = theirs.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if "nested" in file else state, path)
    variant = "Seg-T-DeiT-Mask/16" if distilled else "Seg-T-Mask/16"
    model = tiny(variant, patch_size=PATCH, norm_eps=1e-6)
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    report = load_pretrained(model, path)
    with torch.no_grad():
        ours = model.encoder(images(), return_features=True)
        torch.testing.assert_close(ours, theirs(images()), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[n]) for n, value in model.decoder.state_dict().items())
    heads = {"encoder.head.weight", "encoder.head.bias"}
    if distilled:
        heads |= {"encoder.head_dist.weight", "encoder.head_dist.bias"}
    assert set(report.ignored) == heads and not report.resized
    assert set(report.fresh) == heads | {f"decoder.{name}" for name in before}
    text = str(report)
    assert "timm" in text and "tensors taken" in text and "left as initialised: " in text


def test_a_classifier_of_the_same_size_is_taken(tmp_path):
    theirs = shaken(TimmViT())
    theirs.head = nn.Linear(WIDTH, 1000)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model = tiny()
    load_pretrained(model, tmp_path / "vit.pth")
    assert torch.equal(model.encoder.head.weight, theirs.head.weight)


def timm_repository(folder, state, mean, std):
    """What a hub repository of timm holds, by the names that ours have, too."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"architecture": "vit", "num_classes": 7, "pretrained_cfg": {"mean": mean, "std": std}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("file", [".", "model.safetensors"])
def test_a_hub_repository_of_timm(tmp_path, file, caplog):
    """Its config tells the normalisation, which the tensors of a DeiT without distillation do not.

    ImageNet's for `create_model`, unless another is asked for, which is worth a warning.
    """
    theirs, (mean, std) = shaken(TimmViT()), NORMALIZATION["deit"]
    path = timm_repository(tmp_path / "repository", theirs.state_dict(), mean, std) / file
    sizes = {"num_classes": 3, "image_size": SIDE, "norm_eps": 1e-6, **FIELDS}
    with caplog.at_level(logging.WARNING, "segmenter_fast"):
        model = create_model("Seg-N/8", pretrained=path, **sizes).eval()
        assert (model.config.mean, model.config.std) == (mean, std) and not caplog.records
        other = create_model("Seg-N/8", pretrained=path, mean=(0.5,) * 3, **sizes)
    assert other.config.mean == (0.5,) * 3 and "was trained on images" in caplog.text
    with torch.no_grad():
        ours = model.encoder(images(), return_features=True)
        torch.testing.assert_close(ours, theirs(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"pretrained_cfg": {"mean": [1], "std": "x"}}', ""])
def test_a_foreign_config_beside_the_weights_says_nothing(tmp_path, text):
    folder = timm_repository(tmp_path / "repository", TimmViT().state_dict(), 0, 0)
    (folder / "config.json").write_text(text)
    model = create_model("Seg-N/8", 3, SIDE, pretrained=folder, **FIELDS)
    assert model.config.mean == (0.5, 0.5, 0.5)


def test_create_model_needs_the_name_of_weights():
    with pytest.raises(TypeError, match="named by a path or a str, got bool"):
        create_model("Seg-N/8", 3, SIDE, pretrained=True, **FIELDS)
    with pytest.raises(FileNotFoundError, match="no weights 'streets'"):
        create_model("Seg-N/8", 3, SIDE, pretrained="streets", **FIELDS)


def test_weights_saved_from_a_wrapper(tmp_path):
    theirs = shaken(TimmViT())
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": state}, tmp_path / "vit.pth")
    model = tiny()
    load_pretrained(model, tmp_path / "vit.pth")
    assert torch.equal(model.encoder.cls_token, theirs.cls_token)


class MmsegLayer(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH, eps), nn.LayerNorm(WIDTH, eps)
        self.attn, self.ffn = nn.Module(), nn.Module()
        self.attn.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        first = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU())
        self.ffn.layers = nn.Sequential(first, nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.ln1(x)
        x = x + self.attn.attn(y, y, y, need_weights=False)[0]
        return x + self.ffn.layers(self.ln2(x))


class MmsegSegmenter(nn.Module):
    """Segmenter with MMSegmentation's names and conventions."""

    def __init__(self, n_cls=5, mask=True, bias=True):
        super().__init__()
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        body, head = self.backbone, self.decode_head
        body.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        body.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        body.patch_embed = nn.Module()
        body.patch_embed.projection = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=bias)
        body.layers = nn.ModuleList(MmsegLayer(1e-6) for _ in range(DEPTH))
        body.ln1 = nn.LayerNorm(WIDTH, 1e-6)
        self.mask, self.n_cls = mask, n_cls
        if not mask:
            head.conv_seg = nn.Conv2d(WIDTH, n_cls, 1)
            return
        head.dec_proj = nn.Linear(WIDTH, WIDTH)
        head.cls_emb = nn.Parameter(torch.randn(1, n_cls, WIDTH))
        head.layers = nn.ModuleList([MmsegLayer(1e-5)])
        head.patch_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        head.classes_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        head.decoder_norm, head.mask_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(n_cls)

    def forward(self, x):
        body, head = self.backbone, self.decode_head
        x = body.patch_embed.projection(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([body.cls_token.expand(len(x), -1, -1), x], 1) + body.pos_embed
        for layer in body.layers:
            x = layer(x)
        x = body.ln1(x)[:, 1:]
        if not self.mask:
            return head.conv_seg(x.transpose(1, 2).unflatten(2, grid))
        x = torch.cat([head.dec_proj(x), head.cls_emb.expand(len(x), -1, -1)], 1)
        for layer in head.layers:
            x = layer(x)
        x = head.decoder_norm(x)
        patches = F.normalize(head.patch_proj(x[:, : -self.n_cls]), dim=-1)
        classes = F.normalize(head.classes_proj(x[:, -self.n_cls :]), dim=-1)
        masks = head.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize("mask", [True, False])
def test_mmseg_by_the_command(tmp_path, mask):
    """The converted folder is a whole model, and gives what theirs gives."""
    theirs = shaken(MmsegSegmenter(mask=mask)).eval()
    state = theirs.state_dict() | {"auxiliary_head.conv_seg.weight": torch.zeros(5, WIDTH, 1, 1)}
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "theirs.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    words = ["convert", tmp_path / "theirs.pth", tmp_path / "ours", "--heads", HEADS]
    words += ["--class-names", tmp_path / "names.txt"]
    result = CliRunner().invoke(app, list(map(str, words)))
    if mask:  # the mask transformer of a width that 64 does not divide has the encoder's heads
        assert "5 classes, crop (32, 32)" in result.output
    assert result.exit_code == 0, result.output
    model = SegmenterModel.from_pretrained(tmp_path / "ours")
    assert model.config.class_names == tuple("abcde") and model.config.norm_eps == 1e-6
    with torch.no_grad():
        ours = model.patch_logits(images()).grid
        torch.testing.assert_close(ours, theirs(images()), rtol=1e-4, atol=1e-4)


NAMES, COLOURS = ["a", "b", "c", "d", "e"], [[0, 1, i] for i in range(5)]


@pytest.mark.parametrize(
    ("meta", "names", "palette"),
    [
        ({"CLASSES": NAMES, "PALETTE": COLOURS, "env_info": "x"}, True, True),  # before MMEngine
        ({"dataset_meta": {"classes": tuple(NAMES), "palette": COLOURS}, "iter": 1}, True, True),
        ({"dataset_meta": {"classes": NAMES, "palette": None}}, True, False),
        ({"dataset_meta": {"classes": NAMES, "palette": COLOURS[:4]}}, True, False),
        ({"CLASSES": NAMES, "PALETTE": [[0, 1, 256]] * 5}, True, False),
        ({"CLASSES": NAMES[:4], "PALETTE": COLOURS[:4]}, False, False),
        ({"CLASSES": [1, 2, 3, 4, 5], "dataset_meta": 3}, False, False),
        ([1], False, False),
        (None, False, False),
    ],
)
def test_mmseg_class_names(tmp_path, meta, names, palette):
    state = MmsegSegmenter().state_dict()
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "theirs.pth")
    config = load_whole(tmp_path / "theirs.pth", HEADS).config
    assert config.class_names == (tuple(NAMES) if names else None)
    assert config.palette == (tuple(map(tuple, COLOURS)) if palette else None)


def test_mmseg_versions(tmp_path):
    """Since 1.2 the patch projection has no bias; at first a mask transformer had a classifier."""
    theirs = shaken(MmsegSegmenter(bias=False)).eval()
    state = dict(theirs.state_dict())
    state["decode_head.conv_seg.weight"] = torch.randn(5, WIDTH, 1, 1)
    state["decode_head.conv_seg.bias"] = torch.randn(5)
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    model = load_whole(tmp_path / "theirs.pth", HEADS)
    with torch.no_grad():
        ours = model.patch_logits(images()).grid
        torch.testing.assert_close(ours, theirs(images()), rtol=1e-4, atol=1e-4)
    report = load_pretrained(tiny(), tmp_path / "theirs.pth")
    # The outputs do not show a constant in all channels: the norms take it away.
    assert not model.encoder.patch_embed.proj.bias.any()
    unused = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert set(report.ignored) == unused and "ignored: decode_head.conv_seg" in str(report)
    assert "encoder.patch_embed.proj.bias" in report.taken


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_the_way_out_for_objects_in_a_checkpoint(tmp_path, key):
    """Refused; the line in the message makes a file that is not."""
    state = shaken(TimmViT()).state_dict()
    torch.save({key: state, "args": argparse.Namespace(lr=1)}, tmp_path / "log.pth")
    model = tiny()
    with pytest.raises(CheckpointError, match=r"nothing in it was run: .*argparse\.Name") as caught:
        load_pretrained(model, tmp_path / "log.pth")
    code = re.search(r'python -c "(.*)"$', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=100)
    load_pretrained(model, tmp_path / "weights.pth")
    assert torch.equal(model.encoder.cls_token, state["cls_token"])


def test_mmseg_backbone_alone(tmp_path):
    theirs = shaken(MmsegSegmenter())
    state = {
        name.removeprefix("backbone."): value
        for name, value in theirs.state_dict().items()
        if name.startswith("backbone.")
    }
    torch.save(state, tmp_path / "vit.pth")
    report = load_pretrained(tiny(), tmp_path / "vit.pth")
    assert all(n.startswith("decoder.") or ".head." in n for n in report.fresh)
    with pytest.raises(CheckpointError, match=r"no whole Segmenter but an encoder: name the model"):
        load_whole(tmp_path / "vit.pth")


def write_jax(path, **changes):
    """A ViT in the layout of Google's vision_transformer; its arrays."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    arrays = {
        "cls": draw(1, 1, WIDTH),
        "embedding/kernel": draw(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": draw(WIDTH),
        "Transformer/posembed_input/pos_embedding": draw(1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "Transformer/encoder_norm/scale": draw(WIDTH),
        "Transformer/encoder_norm/bias": draw(WIDTH),
        "head/kernel": draw(WIDTH, 7),
        "head/bias": draw(7),
        "pre_logits/kernel": draw(WIDTH, WIDTH),
        "pre_logits/bias": draw(WIDTH),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = draw(WIDTH)
            arrays[f"{block}/{norm}/bias"] = draw(WIDTH)
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            arrays[f"{attention}/{name}/kernel"] = draw(WIDTH, HEADS, WIDTH // HEADS)
            arrays[f"{attention}/{name}/bias"] = draw(HEADS, WIDTH // HEADS)
        arrays[f"{attention}/out/kernel"] = draw(HEADS, WIDTH // HEADS, WIDTH)
        arrays[f"{attention}/out/bias"] = draw(WIDTH)
        arrays[f"{block}/MlpBlock_3/Dense_0/kernel"] = draw(WIDTH, 4 * WIDTH)
        arrays[f"{block}/MlpBlock_3/Dense_0/bias"] = draw(4 * WIDTH)
        arrays[f"{block}/MlpBlock_3/Dense_1/kernel"] = draw(4 * WIDTH, WIDTH)
        arrays[f"{block}/MlpBlock_3/Dense_1/bias"] = draw(WIDTH)
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return arrays


def jax_forward(arrays, images):
    """The encoder by the conventions of flax: images last in channels, kernels (in, ..., out)."""
    p = {name: torch.from_numpy(value).double() for name, value in arrays.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    pixels = images.double().permute(0, 2, 3, 1)
    n = SIDE // PATCH
    patches = pixels.reshape(-1, n, PATCH, n, PATCH, 3)
    x = torch.einsum("bipjqc,pqcd->bijd", patches, p["embedding/kernel"]) + p["embedding/bias"]
    x = torch.cat([p["cls"].expand(len(x), -1, -1), x.flatten(1, 2)], 1)
    x = x + p["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            torch.einsum("bnd,dhk->bnhk", y, p[f"{attention}/{name}/kernel"])
            + p[f"{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        weights = torch.einsum("bnhk,bmhk->bhnm", q, k) / (WIDTH // HEADS) ** 0.5
        y = torch.einsum("bhnm,bmhk->bnhk", weights.softmax(-1), v)
        x = x + torch.einsum("bnhk,hkd->bnd", y, p[f"{attention}/out/kernel"])
        x = x + p[f"{attention}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_2")
        y = y @ p[f"{block}/MlpBlock_3/Dense_0/kernel"] + p[f"{block}/MlpBlock_3/Dense_0/bias"]
        y = F.gelu(y) @ p[f"{block}/MlpBlock_3/Dense_1/kernel"]
        x = x + y + p[f"{block}/MlpBlock_3/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm").float()


def test_google(tmp_path):
    arrays = write_jax(tmp_path / "vit.npz")
    model = tiny(norm_eps=1e-6)
    report = load_pretrained(model, tmp_path / "vit.npz")
    with torch.no_grad():
        ours = model.encoder(images(), return_features=True)
    torch.testing.assert_close(ours, jax_forward(arrays, images()), rtol=1e-4, atol=1e-4)
    assert "encoder.pre_logits.weight" in report.ignored


NEWER = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/", "img/"])
def test_google_s_other_names(tmp_path, prefix, newer):
    """Blocks by the numbers of newer versions of flax, beside a text encoder, or in a training."""
    old = write_jax(tmp_path / "old.npz")
    arrays = {"params/txt/embedding" if "img" in prefix else "opt/state/step": np.ones(3, int)}
    unused = list(arrays) if prefix else []
    for name, value in old.items():
        for one, other in NEWER.items() if newer else ():
            name = name.replace(f"/{one}/", f"/{other}/")
        arrays[prefix + name] = value
    if not prefix:
        del arrays["opt/state/step"]
    np.savez(tmp_path / "other.npz", **arrays)
    one, other = tiny(seed=1), tiny(seed=1)
    load_pretrained(one, tmp_path / "old.npz")
    report = load_pretrained(other, tmp_path / "other.npz")
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert list(report.ignored[-len(unused) :]) == unused if unused else True


def test_google_s_positions_without_the_class_token(tmp_path):
    """They are added before the class token is put in front: its own position is zero."""
    positions = "Transformer/posembed_input/pos_embedding"
    arrays = write_jax(tmp_path / "old.npz")
    grid = arrays[positions][:, 1:]
    write_jax(tmp_path / "vit.npz", **{positions: None, "pos_embedding": grid})
    arrays[positions] = np.concatenate([0 * grid[:, :1], grid], axis=1)
    model = tiny(norm_eps=1e-6)
    load_pretrained(model, tmp_path / "vit.npz")
    with torch.no_grad():
        ours = model.encoder(images(), return_features=True)
    torch.testing.assert_close(ours, jax_forward(arrays, images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [">f4", "f2", "f8", "g"])
def test_google_s_weights_of_other_floating_types(tmp_path, kind):
    arrays = write_jax(tmp_path / "vit.npz")
    np.savez(tmp_path / "other.npz", **{name: x.astype(kind) for name, x in arrays.items()})
    model = tiny()
    load_pretrained(model, tmp_path / "other.npz")
    expected = torch.from_numpy(arrays["cls"].astype(kind).astype("f4"))
    assert torch.equal(model.encoder.cls_token, expected)


def test_train_command_starts_from_google_s_weights(tmp_path):
    path = tmp_path / "vit.npz"
    torch.manual_seed(0)
    model = create_model("Seg-N/16", 3, 32)
    # The layout of test_google in the width of a variant that the command knows.
    arrays, state = {}, model.encoder.state_dict()

    def dense(theirs, ours, shape=None):
        kernel = state[f"{ours}.weight"].T.numpy()
        arrays[f"{theirs}/kernel"] = kernel if shape is None else kernel.reshape(shape)
        arrays[f"{theirs}/bias"] = state[f"{ours}.bias"].numpy()

    for ours, theirs in (("cls_token", "cls"),
                         ("pos_embed", "Transformer/posembed_input/pos_embedding"),
                         ("norm.weight", "Transformer/encoder_norm/scale"),
                         ("norm.bias", "Transformer/encoder_norm/bias"),
                         ("patch_embed.proj.bias", "embedding/bias")):  # fmt: skip
        arrays[theirs] = state[ours].numpy()
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0).numpy()
    for i in range(6):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        qkv = state[f"{ours}.attn.qkv.weight"].reshape(3, 2, 64, 128).permute(0, 3, 1, 2)
        bias = state[f"{ours}.attn.qkv.bias"].reshape(3, 2, 64)
        for j, name in enumerate(("query", "key", "value")):
            attention = f"{block}/MultiHeadDotProductAttention_1"
            arrays[f"{attention}/{name}/kernel"] = qkv[j].numpy()
            arrays[f"{attention}/{name}/bias"] = bias[j].numpy()
        dense(f"{attention}/out", f"{ours}.attn.proj", (2, 64, 128))
        dense(f"{block}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{block}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{block}/LayerNorm_{number}/scale"] = state[f"{ours}.{norm}.weight"].numpy()
            arrays[f"{block}/LayerNorm_{number}/bias"] = state[f"{ours}.{norm}.bias"].numpy()
    np.savez(path, **arrays)
    words = [
        "train", "--dataset", "scenes", "--count", 2, "--val-count", 1, "--steps", 1,
        "--batch-size", 1, "--lr", 0, "--min-lr", 0, "--init", path,
    ]  # fmt: skip
    more = ["--model", "Seg-N-Mask/16", "--image-size", "48,32", "-o", tmp_path / "run"]
    result = CliRunner().invoke(app, list(map(str, words + more)))
    assert result.exit_code == 0, result.output
    assert "(Google's ViT)" in result.output and "resized: encoder.pos_embed" in result.output
    trained = SegmenterModel.from_pretrained(tmp_path / "run/last").encoder.state_dict()
    for name, value in state.items():
        if not name.startswith(("head", "pos_embed")):
            assert torch.equal(trained[name], value), name
    result = CliRunner().invoke(app, list(map(str, [*words, "-o", tmp_path / "other"])))
    assert result.exit_code == 1 and "no whole Segmenter" in result.output
    result = CliRunner().invoke(app, list(map(str, [*words, *more, "--patch-size", 8])))
    assert result.exit_code == 2 and "Invalid value for --patch-size" in result.output


def test_train_command_resamples_patches(tmp_path):
    """Bundled weights at another patch size and with other classes, by one step of no length."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    for kind, picture in (("images", pixels), ("annotations", pixels[..., 0] % 3)):
        for split in ("train", "val"):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            Image.fromarray(picture).save(folder / "a.png")
    words = [
        "train", "--dataset", "folder", "--root", tmp_path / "data", "--num-classes", 3,
        "--steps", 1, "--batch-size", 1, "--lr", 0, "--min-lr", 0, "--workers", 0,
        "--init", "street", "--patch-size", 16, "--image-size", "48,32", "-o", tmp_path / "run",
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    start = SegmenterModel.from_pretrained("street")
    trained = SegmenterModel.from_pretrained(tmp_path / "run/last")
    config = trained.config
    assert (config.variant, config.patch_size, config.backbone) == ("Seg-N-Mask/16", 16, None)
    assert config.n_cls == 3 and start.n_cls == 11
    assert (config.mean, config.std) == (start.config.mean, start.config.std)
    name = "encoder.patch_embed.proj.weight"
    assert name in result.output
    expected = resize_filters(start.state_dict()[name], 16)
    assert torch.equal(trained.state_dict()[name], expected)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(trained.state_dict()[name], start.state_dict()[name])


# --- Segmenters ----------------------------------------------------------------------------------


def saved(tmp_path, **changes):
    source = shaken(tiny(**changes))
    source.save_pretrained(tmp_path / "source")
    return source, tmp_path / "source"


def test_what_the_train_command_keeps_of_the_weights(tmp_path):
    """The normalisation; the backbone's name while it has the patch size."""
    mean, std = NORMALIZATION["deit"]
    create_model("Seg-N-Mask/16", 3, 32, mean=mean, std=std).save_pretrained(tmp_path / "deit")
    weights = read_weights(tmp_path / "deit")
    model = _starting_model("Seg-N/16", weights, 3, {"image_size": (32, 32)}, "auto", talks=False)
    assert (model.config.mean, model.config.std) == (mean, std)
    weights = read_weights(saved(tmp_path, backbone="vit_patch8")[1])
    for patch_size, name in ((PATCH, "vit_patch8"), (16, None)):
        changes = {"image_size": None, "patch_size": patch_size}
        model = _starting_model(None, weights, 3, changes, "auto", talks=False)
        assert (model.config.backbone, model.patch_size) == (name, patch_size)


def test_other_classes(tmp_path):
    source, folder = saved(tmp_path)
    model = tiny(n_cls=9, seed=5)
    fresh = model.decoder.cls_emb.detach().clone()
    report = load_pretrained(model, folder)
    names = {"decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"}
    assert set(report.fresh) == set(report.ignored) == names
    assert torch.equal(model.decoder.cls_emb, fresh)
    mine, theirs = model.state_dict(), source.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name not in names)


def test_same_model_is_the_same_to_the_bit(tmp_path):
    source, folder = saved(tmp_path)
    for path in (folder, folder / "model.safetensors", str(folder)):
        model = tiny(seed=5)
        report = load_pretrained(model, path)
        assert not report.fresh and not report.resized and not report.ignored
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_other_decoder(tmp_path):
    source, folder = saved(tmp_path)
    model = tiny("Seg-N/8", seed=5)
    report = load_pretrained(model, folder)
    assert set(report.fresh) == {"decoder.head.weight", "decoder.head.bias"}
    assert all(name.startswith("decoder.") for name in report.ignored)
    assert torch.equal(model.encoder.pos_embed, source.encoder.pos_embed)


def test_other_crop(tmp_path):
    """Not square on either side: the config knows the grid."""
    source, folder = saved(tmp_path, size=(32, 64))
    model = tiny(size=(64, 64), seed=5)
    report = load_pretrained(model, folder)
    assert report.resized == ("encoder.pos_embed",)
    grid = source.encoder.pos_embed[:, 1:].unflatten(1, (4, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 8), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.encoder.pos_embed[:, 1:], expected)
    assert torch.equal(model.encoder.pos_embed[:, :1], source.encoder.pos_embed[:, :1])


def test_other_patch_size(tmp_path):
    """Twice the patch on a picture of twice the size: the same tokens."""
    source, folder = saved(tmp_path)
    model = tiny("Seg-N-Mask/16", size=64, seed=5)
    report = load_pretrained(model, folder)
    assert report.resized == ("encoder.patch_embed.proj.weight",)
    patches = images().unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).transpose(3, 4)
    large = F.interpolate(patches.flatten(0, 3)[:, None], size=(16, 16), mode="bilinear")
    large = large.reshape(2, 3, 4, 4, 16, 16).transpose(3, 4).reshape(2, 3, 64, 64)
    with torch.no_grad():
        one, two = (m.patch_logits(x).grid for m, x in ((source, images()), (model, large)))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_filters_for_larger_patches_give_the_same_products(size):
    filters = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    patch = torch.randn(3, 8, 8, dtype=torch.float64)
    large = F.interpolate(patch[None], size=(size, size), mode="bilinear")[0]
    expected = (filters * patch).sum((1, 2, 3))
    resized = resize_filters(filters, size)
    torch.testing.assert_close((resized * large).sum((1, 2, 3)), expected)


def test_filters_for_smaller_patches_are_the_best_there_are():
    """Least squares: the error over all patches is not lowered by any change of the filters."""
    filters = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    basis = torch.eye(256, dtype=torch.float64).reshape(256, 1, 16, 16)
    small = F.interpolate(basis, size=(8, 8), mode="bilinear", antialias=True).flatten(1)
    expected = torch.linalg.lstsq(small, filters.reshape(256, 1)).solution
    torch.testing.assert_close(resize_filters(filters, 8).reshape(64, 1), expected)


def test_half_precision_and_bare_files(tmp_path):
    """Weights of a Segmenter without a config beside them, in float16."""
    source = shaken(tiny())
    state = {name: value.half() for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "bare.pth")
    model = tiny(seed=5)
    load_pretrained(model, tmp_path / "bare.pth")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


def test_half_precision_is_resampled_in_full(tmp_path):
    source = shaken(tiny())
    state = {name: value.half() for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "bare.pth")
    model = tiny("Seg-N-Mask/16", size=128, seed=5)
    report = load_pretrained(model, tmp_path / "bare.pth")
    assert set(report.resized) == {"encoder.pos_embed", "encoder.patch_embed.proj.weight"}
    filters = state["encoder.patch_embed.proj.weight"].float()
    assert torch.equal(model.encoder.patch_embed.proj.weight, resize_filters(filters, 16))


# --- What does not fit, or is not safe -----------------------------------------------------------


def refused(model, path, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_architectures_are_refused(tmp_path):
    folder = saved(tmp_path)[1]
    refused(tiny(n_layers=3), folder, r"3 layers, .*; missing: encoder\.blocks\.2\.")
    refused(tiny(n_layers=1), folder, r"not in the model: encoder\.blocks\.1\.")
    refused(tiny(d_model=48), folder, r"other shapes: decoder.*is \(24,\), the model's \(48,\)")
    refused(tiny(decoder_n_layers=2), folder, r"missing: decoder\.blocks\.1\.")
    refused(tiny(decoder_n_layers=2, n_cls=7), folder, r"missing: decoder\.blocks\.1\.")
    refused(tiny("Seg-T-DeiT-Mask/16"), folder, "no distillation token and the model a: take a v")
    # Other heads have the same shapes.
    refused(tiny(n_heads=4), folder, "; heads: 3, the model's 4")
    with pytest.raises(CheckpointError, match="has 3 heads by its config, not 4"):
        load_whole(folder, n_heads=4)
    write_jax(tmp_path / "vit.npz")
    refused(tiny(n_heads=4), tmp_path / "vit.npz", "; heads: 3, the model's 4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Not another number of classes, which would be left as initialised.
        ({"decoder.mask_norm.bias": torch.ones(4)}, r"other shapes: decoder\.mask_norm\.bias is"),
        ({"decoder.cls_emb": torch.ones(1, 5, 1)}, r"other shapes: decoder\.cls_emb is \(1, 5, 1"),
        ({"decoder.cls_emb": torch.ones(5)}, r"other shapes: decoder\.cls_emb is \(5,\)"),
        ({"decoder.cls_emb": torch.ones(1, 7, WIDTH)}, r"other shapes: decoder\.cls_emb is"),
        ({"decoder.cls_emb": None}, r"missing: decoder\.cls_emb"),
        ({"decoder.extra": torch.ones(3)}, r"not in the model: decoder\.extra"),
        ({"decoder.cls_emb": torch.ones(1, 5, WIDTH, dtype=torch.int8)}, "not floating point: de"),
        (
            {"encoder.norm.bias": torch.ones(WIDTH, dtype=torch.complex64)},
            r"not floating point: encoder\.norm\.bias",
        ),
    ],
)
def test_bad_files_of_segmenters(tmp_path, change, message):
    state = {k: v for k, v in (tiny().state_dict() | change).items() if v is not None}
    torch.save({"model": state}, tmp_path / "bare.pth")
    refused(tiny(seed=5), tmp_path / "bare.pth", message)


def test_two_names_for_one_parameter_are_refused(tmp_path):
    state = MmsegSegmenter().state_dict()
    torch.save(dict(state, cls_token=state["backbone.cls_token"]), tmp_path / "vit.pth")
    refused(tiny(), tmp_path / "vit.pth", "not known in a Segmenter of MMSegmentation: cls_token")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.qkv.weight": None}, r"missing: encoder\.blocks\.0\.attn\.qkv\.weight"),
        (
            {"blocks.0.ls1.gamma": torch.ones(WIDTH)},
            r"not known in a ViT .*: blocks\.0\.ls1\.gamma",
        ),
        ({"norm.bias": torch.full((WIDTH,), torch.nan)}, r"NaN or infinite values: encoder\.norm"),
        ({"pos_embed": torch.ones(1, 12, WIDTH)}, r"a square N .* got \(1, 12, 24\)"),
        ({"patch_embed.proj.weight": torch.ones(WIDTH, 3, 8, 4)}, r"must be \(D, 3, P, P\)"),
        (
            {"dist_token": torch.ones(1, 1, WIDTH)},
            "a distillation token and the model no: take a -D",
        ),
        ({"pos_embed": None}, "of no known layout"),
    ],
)
def test_bad_files_of_timm(tmp_path, change, message):
    state = {k: v for k, v in (TimmViT().state_dict() | change).items() if v is not None}
    torch.save(state, tmp_path / "vit.pth")
    refused(tiny(), tmp_path / "vit.pth", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls": None}, "not a ViT of Google's vision_transformer: no cls"),
        ({"Transformer/encoderblock_1/LayerNorm_0/bias": None}, "no Transformer/encoderblock_1/L"),
        ({"extra": np.ones(3)}, "not known in a ViT of Google's: extra"),
        ({"cls": np.ones((1, 1, WIDTH), dtype=int)}, "expected floating point arrays: cls"),
        ({"cls": np.array([{"a": 1}], dtype=object)}, "damaged, or not an .npz of plain arrays"),
        ({"cls": np.ones(WIDTH)}, r"cls has the shape \(24,\); expected 3 dimensions"),
        ({"cls": np.ones((1, 0, WIDTH))}, r"cls has the shape \(1, 0, 24\)"),
        ({"embedding/kernel": np.ones((8, 24))}, r"embedding/kernel has the shape \(8, 24\)"),
        ({"head/kernel": np.ones((WIDTH, 3))}, r"head has a kernel \(24, 3\) and a bias of 7"),
        (
            {
                "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel": np.ones(
                    (WIDTH, 2, 12)
                )
            },
            "MultiHeadDotProductAttention_1 has kernels of several shapes",
        ),
        ({"Transformer/posembed_input/pos_embedding": np.ones((1, 12, WIDTH))}, "a square N"),
        ({"cls": np.full((1, 1, WIDTH), 1e300)}, r"NaN or infinite values: encoder\.cls_token"),
    ],
)
def test_bad_files_of_google(tmp_path, change, message):
    write_jax(tmp_path / "vit.npz", **change)
    refused(tiny(), tmp_path / "vit.npz", message)


def test_damaged_and_hostile_files(tmp_path):
    write_jax(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    refused(tiny(), tmp_path / "short.npz", "damaged, or not an .npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(2**20), b=np.zeros(2**20))
    refused(tiny(), tmp_path / "bomb.npz", "bytes but claims 16777[0-9]+ bytes of arrays")
    claim = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(claim, shape)
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("cls.npy", claim.getvalue())
    refused(tiny(), tmp_path / "claim.npz", "damaged, or not an .npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    refused(tiny(), tmp_path / "text.npz", r"not an \.npz of plain arrays: notes\.txt")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    refused(tiny(), tmp_path / "none.pth", "no tensors, only epoch")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tiny(), tmp_path / "weights.bin", r"weights are \.npz, \.pth, \.pt or \.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_pretrained(tiny(), tmp_path / "gone.npz")


def test_any_damage_to_an_archive_is_named(tmp_path):
    """Bytes turned over at random: zlib, zipfile and NumPy all complain in their own ways."""
    arrays = write_jax(tmp_path / "vit.npz")
    np.savez_compressed(tmp_path / "vit.npz", **arrays)
    content, rng = (tmp_path / "vit.npz").read_bytes(), np.random.default_rng(0)
    model = tiny()
    load_pretrained(model, tmp_path / "vit.npz")
    for _ in range(40):
        broken = bytearray(content)
        for place in rng.integers(len(content), size=3):
            broken[place] ^= int(rng.integers(1, 256))
        (tmp_path / "broken.npz").write_bytes(broken)
        try:
            load_pretrained(model, tmp_path / "broken.npz")
        except CheckpointError as error:
            assert "broken.npz" in str(error)


def test_other_normalisation_is_pointed_out(tmp_path, caplog):
    write_jax(tmp_path / "vit.npz")
    with caplog.at_level(logging.WARNING, "segmenter_fast"):
        load_pretrained(tiny(), tmp_path / "vit.npz")
        assert not caplog.records
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        load_pretrained(tiny(mean=mean, std=std), tmp_path / "vit.npz")
    assert "was trained on images normalised with mean (0.5, 0.5, 0.5)" in caplog.text


def test_convert_needs_names_for_all_classes(tmp_path):
    folder = saved(tmp_path)[1]
    (tmp_path / "names.txt").write_text("a\nb\n")
    words = ["convert", folder, tmp_path / "out", "--class-names", tmp_path / "names.txt"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
