"""Turn a model that exists in memory into ours, without copying its weights.

    model = segmenter_fast.convert(model)

An official Segmenter becomes a `SegmenterModel`, a ViT or DeiT of timm our `VisionTransformer`.
Both are recognised by their structure; neither library is imported. The parameters are the same
objects, so an optimiser that was made before goes on working, and what one model learns the other
knows.

Names and shapes prove little: a layer scale of ones, another activation or another order of the
norms would pass. So both models see one image, and the conversion is refused if they differ.
"""

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor, nn

from segmenter_fast.blocks import DropPath
from segmenter_fast.checkpoint import some
from segmenter_fast.config import MLP_RATIO, NORMALIZATION, SegmenterConfig
from segmenter_fast.encoder import VisionTransformer
from segmenter_fast.model import SegmenterModel
from segmenter_fast.variants import create_model_from_config

# Largest difference of the two models' outputs, over the largest output.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ConversionError(ValueError):
    """A model that ours cannot stand for; the message names what it has that ours has not."""


def convert(
    model: nn.Module, normalization: str | None = None, backend: str = "auto", check: bool = True
) -> SegmenterModel | VisionTransformer:
    """Make ours of an official Segmenter or a timm VisionTransformer, sharing all parameters.

    Args:
        model: with the structure of `segm.model.segmenter.Segmenter`, or of timm's
            `VisionTransformer` or its distilled form. A wrapper such as DistributedDataParallel is
            to be taken off (`.module`).
        normalization: "vit" (mean and std 0.5) or "deit" (ImageNet's), which prediction needs and
            no module knows; None is "deit" for a model with a distillation token.
        backend: "auto", "reference", "native" or "triton".
        check: run both models on one image of the training crop and compare.

    Returns:
        SegmenterModel, or the VisionTransformer of an encoder, for `SegmenterModel(encoder, ...)`;
        in the mode (training or evaluation), on the device and in the precision of `model`.

    Raises:
        ConversionError: another structure, or parts that ours would silently leave out.

    Source: official segm/model/segmenter.py, vit.py, decoder.py; timm's vision_transformer.py.
    """
    if hasattr(model, "module") and isinstance(model.module, nn.Module):
        _refuse(f"{type(model).__name__} wraps a model: convert its .module before wrapping it")
    _refuse_extras(model)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        ours = _segmenter(model, normalization, backend)
    elif hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        ours = _encoder(model)
        ours.backend = backend
        for module in ours.modules():
            if hasattr(module, "backend"):
                module.backend = backend
    else:
        _refuse(
            f"{type(model).__name__} is neither an official Segmenter (encoder and decoder) nor a "
            "ViT of timm (patch_embed and blocks)"
        )
    ours.train(model.training)
    if check:
        _compare(model, ours)
    return ours


def _refuse(text: str) -> NoReturn:
    raise ConversionError(text)


def _refuse_extras(model: nn.Module) -> None:
    """What works on the modules of `model` would be lost with them."""
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            _refuse(
                f"{name or 'the model'} has hooks, which would no longer be called: remove them"
            )
        if "parametrizations" in module._modules:
            _refuse(f"{name}: parametrised weights (remove_parametrizations makes them plain)")


def _segmenter(model: nn.Module, normalization: str | None, backend: str) -> SegmenterModel:
    encoder, decoder = model.encoder, model.decoder
    shape = _shape(encoder)
    normalization = normalization or ("deit" if shape["distilled"] else "vit")
    if normalization not in NORMALIZATION:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATION)}; got {normalization!r}"
        )
    mask = hasattr(decoder, "cls_emb")
    if not mask and not isinstance(getattr(decoder, "head", None), nn.Linear):
        _refuse(f"{type(decoder).__name__} is neither a linear decoder nor a mask transformer")
    mean, std = NORMALIZATION[normalization]
    window = min(shape["image_size"])
    config = SegmenterConfig(
        **shape,
        n_cls=decoder.cls_emb.shape[1] if mask else decoder.head.out_features,
        decoder="mask_transformer" if mask else "linear",
        decoder_n_layers=len(decoder.blocks) if mask else 0,
        mean=mean,
        std=std,
        window_size=window,
        window_stride=window,
    )
    if mask and _heads(decoder.blocks) != config.decoder_n_heads:
        _refuse(f"the decoder has {_heads(decoder.blocks)} heads, ours {config.decoder_n_heads}")
    if mask and _eps(decoder) != {1e-5}:
        _refuse(f"the decoder's layer norms have eps {sorted(_eps(decoder))}, ours 1e-5")
    with torch.device("meta"):
        ours = create_model_from_config(config, backend)
    _fill_heads(ours.encoder, encoder)
    _share(model, ours)
    _regularise(ours.encoder, encoder)
    if mask:
        _regularise(ours.decoder, decoder)
    config = config.replace(
        drop_path_rate=_rate(ours.encoder.blocks),
        dropout=ours.encoder.dropout.p,
        decoder_drop_path_rate=_rate(ours.decoder.blocks) if mask else 0.0,
        decoder_dropout=ours.decoder.blocks[0].attn.attn_drop.p if mask else 0.0,
    )
    ours.config = config
    return ours


def _encoder(model: nn.Module) -> VisionTransformer:
    if getattr(model, "no_embed_class", False):
        _refuse("no_embed_class: position embeddings without the class token")
    shape = _shape(model)
    with torch.device("meta"):
        ours = VisionTransformer(
            d_ff=MLP_RATIO * shape["d_model"], n_cls=1000, dropout=0.0, **shape
        )
    _fill_heads(ours, model)
    _share(model, ours)
    _regularise(ours, model)
    return ours


def _shape(encoder: nn.Module) -> dict:
    """The arguments that an encoder of ours would be made with."""
    proj = getattr(encoder.patch_embed, "proj", None)
    if not isinstance(proj, nn.Conv2d):
        _refuse(f"patches are embedded by {type(proj).__name__}, not by one convolution")
    plain = (proj.kernel_size, (0, 0), (1, 1), 1)
    if (proj.stride, proj.padding, proj.dilation, proj.groups) != plain:
        _refuse(f"patches that overlap, or a convolution that is not plain: {proj}")
    patch = proj.kernel_size[0]
    embed = encoder.patch_embed
    size = getattr(embed, "image_size", None) or getattr(embed, "img_size", None)
    if size is None:
        _refuse("patch_embed does not say for which image size it was made")
    size = (size, size) if isinstance(size, int) else tuple(size)
    eps = _eps(encoder)
    if len(eps) != 1:
        _refuse(f"layer norms with different eps: {sorted(eps)}")
    return {
        "image_size": size,
        "patch_size": patch,
        "n_layers": len(encoder.blocks),
        "d_model": proj.out_channels,
        "n_heads": _heads(encoder.blocks),
        "distilled": getattr(encoder, "dist_token", None) is not None,
        "norm_eps": eps.pop(),
    }


def _heads(blocks: Iterable[nn.Module]) -> int:
    attention = blocks[0].attn
    heads = getattr(attention, "num_heads", None) or getattr(attention, "heads", None)
    if heads is None:
        _refuse(f"{type(attention).__name__} does not say how many heads it has")
    return heads


def _eps(module: nn.Module) -> set[float]:
    return {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}


def _fill_heads(ours: VisionTransformer, theirs: nn.Module) -> None:
    """The classifiers that weights carry, of any number of classes; ours has one in any case."""
    reference = theirs.cls_token if getattr(theirs, "cls_token", None) is not None else None
    if reference is None:
        _refuse("no class token")
    for name in ("head", "head_dist"):
        if not hasattr(ours, name):
            continue
        head = getattr(theirs, name, None)
        if isinstance(head, nn.Linear):
            made = nn.Linear(head.in_features, head.out_features, device="meta")
        else:
            made = nn.Linear(ours.d_model, ours.n_cls, device=reference.device)
            made = made.to(reference.dtype)
        setattr(ours, name, made)


def _share(theirs: nn.Module, ours: nn.Module) -> None:
    """Put their parameters into our modules, all of them and no other."""
    given = dict(theirs.named_parameters(remove_duplicate=False))
    wanted = dict(ours.named_parameters())
    # A head that theirs has not keeps the values it was made with.
    missing = [n for n, p in wanted.items() if n not in given and p.is_meta]
    extra = [n for n in given if n not in wanted]
    extra += [n for n, _ in theirs.named_buffers()]
    shapes = [
        f"{n} is {tuple(given[n].shape)}, ours {tuple(wanted[n].shape)}"
        for n in given
        if n in wanted and given[n].shape != wanted[n].shape
    ]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("ours has no", extra),
            ("theirs has no", missing),
            ("other shapes", shapes),
        )
        if names
    ]
    if problems:
        _refuse(f"{type(theirs).__name__} is another architecture; {'; '.join(problems)}")
    for name, parameter in given.items():
        path, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(path), leaf, parameter)


def _regularise(ours: nn.Module, theirs: nn.Module) -> None:
    """Dropout and stochastic depth as theirs, place by place."""

    def p_of(module: nn.Module, *names: str) -> float:
        rates = {float(getattr(getattr(module, name, None), "p", 0.0)) for name in names}
        rates = {rate for rate in rates if rate} or {0.0}
        if len(rates) > 1:
            _refuse(f"different rates of dropout in {type(module).__name__}: {sorted(rates)}")
        return rates.pop()

    if hasattr(ours, "dropout"):
        ours.dropout.p = p_of(theirs, "dropout", "pos_drop")
    dropped = getattr(theirs, "patch_drop", None)
    if dropped is not None and not isinstance(dropped, nn.Identity):
        _refuse(f"patches are dropped in training ({type(dropped).__name__})")
    for mine, block in zip(ours.blocks, theirs.blocks, strict=True):
        mine.attn.attn_drop.p = p_of(block.attn, "attn_drop")
        mine.attn.proj_drop.p = p_of(block.attn, "proj_drop")
        mine.mlp.drop.p = p_of(block.mlp, "drop", "drop1", "drop2")
        rates = {
            float(getattr(getattr(block, name), "drop_prob", 0.0) or 0.0)
            for name in ("drop_path", "drop_path1", "drop_path2")
            if hasattr(block, name)
        }
        if len(rates) > 1:
            _refuse(f"different stochastic depth in the branches of a block: {sorted(rates)}")
        rate = rates.pop() if rates else 0.0
        mine.drop_path = DropPath(rate) if rate else nn.Identity()


def _rate(blocks: nn.ModuleList) -> float:
    return float(getattr(blocks[-1].drop_path, "drop_prob", 0.0))


@torch.no_grad()
def _compare(theirs: nn.Module, ours: nn.Module) -> None:
    """Run both on one image in evaluation mode."""
    encoder = ours.encoder if isinstance(ours, SegmenterModel) else ours
    reference = encoder.cls_token
    if reference.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *encoder.patch_embed.image_size, generator=generator)
    image = image.to(reference.device, reference.dtype)
    modes = {module: module.training for module in (*theirs.modules(), *ours.modules())}
    try:
        theirs.eval()
        ours.eval()
        expected = _output(theirs, image)
        got = _output(ours, image)
    finally:
        for module, training in modes.items():
            module.training = training
    scale = float(expected.float().abs().max())
    error = (
        float((got.float() - expected.float()).abs().max()) if got.shape == expected.shape else 0
    )
    limit = TOLERANCE.get(reference.dtype, 1e-3) * scale
    if got.shape != expected.shape or not error <= limit:
        _refuse(
            f"{type(theirs).__name__} has the parameters of ours but computes something else "
            f"({tuple(expected.shape)} and {tuple(got.shape)}, difference {error:g} of {scale:g}): "
            "another activation, layer scale, order of norms or normalisation of queries and keys"
        )


def _output(model: nn.Module, image: Tensor) -> Tensor:
    """Logits of a Segmenter, tokens of an encoder."""
    if isinstance(model, VisionTransformer):
        return model(image, return_features=True)
    if hasattr(model, "forward_features"):
        return model.forward_features(image)
    if hasattr(model, "blocks"):  # an encoder of the official code
        return model(image, return_features=True)
    return model(image)
