"""Turn a model that exists in memory into ours, without copying its weights.

    model = segmenter_fast.convert(model)

An official Segmenter becomes a `SegmenterModel`, a ViT or DeiT of timm our `VisionTransformer`.
Both are recognised by their structure; neither library is imported. The parameters are the same
objects, so an optimiser that was made before goes on working, and what one model learns the other
knows.

Names and shapes prove little: another activation, another scale of the attention or another order
of the norms would pass. So both models see one image, and the conversion is refused if they differ.
They see it with drawn weights in float64: weights as they are initialised hide most of these things
(scores near 0, biases 0), and 16 bits hide the rest.
"""

from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from segmenter_fast.backend import check_backend
from segmenter_fast.blocks import DropPath
from segmenter_fast.checkpoint import some
from segmenter_fast.config import MLP_RATIO, NORMALIZATION, SegmenterConfig
from segmenter_fast.encoder import VisionTransformer
from segmenter_fast.model import SegmenterModel
from segmenter_fast.variants import create_model_from_config

# Largest difference of the two models' float64 outputs, over the largest output. The tanh form of
# GELU is 1e-4 away from the exact one.
TOLERANCE = 1e-6


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
            modules do not know; None is what a timm model's `pretrained_cfg` says, else "deit" for
            a model with a distillation token and "vit" for others.
        backend: "auto", "reference", "native" or "triton".
        check: run both models on one image with drawn weights, and compare; takes the memory of one
            more set of parameters in float64. Without it only the structure is looked at.

    Returns:
        SegmenterModel, or the VisionTransformer of an encoder, for `SegmenterModel(encoder, ...)`;
        each module in the mode (training or evaluation) of its counterpart, on the device and in
        the precision of `model`. Images of another size than a timm model was made for take its
        position embeddings bilinearly, as the official code does, not bicubically.

    Raises:
        ConversionError: another structure, or parts that ours would silently leave out.
        ValueError: unknown normalization or backend.

    Source: official segm/model/segmenter.py, vit.py, decoder.py; timm's vision_transformer.py.
    """
    check_backend(backend)
    if normalization is not None and normalization not in NORMALIZATION:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATION)}; got {normalization!r}"
        )
    if isinstance(model, (SegmenterModel, VisionTransformer)):
        _refuse(f"the {type(model).__name__} is segmenter_fast's already")
    for attribute in ("module", "_orig_mod"):
        if isinstance(getattr(model, attribute, None), nn.Module):
            _refuse(f"{type(model).__name__} wraps a model: convert its .{attribute}, then wrap")
    _refuse_extras(model)
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        ours = _segmenter(model, normalization)
    elif hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        ours = _encoder(model, normalization)
    else:
        _refuse(
            f"{type(model).__name__} is neither an official Segmenter (encoder and decoder) nor a "
            "ViT of timm (patch_embed and blocks)"
        )
    if check:
        _compare(model, ours)
    _set_backend(ours, backend)
    _keep_modes(model, ours)
    return ours


def _set_backend(ours: nn.Module, name: str) -> None:
    for module in ours.modules():
        if hasattr(module, "backend"):
            module.backend = name


def _keep_modes(theirs: nn.Module, ours: nn.Module) -> None:
    """An encoder that was put into evaluation mode stays there while its decoder trains."""
    modes = {name: module.training for name, module in theirs.named_modules()}
    for name, module in ours.named_modules():
        module.training = modes.setdefault(name, modes.get(name.rpartition(".")[0]))


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
        if "forward" in vars(module):
            _refuse(f"{name or 'the model'} has had its forward replaced, which would be lost")
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            _refuse(f"{name} is a {type(module).__name__}, which is more than a linear layer")


def _segmenter(model: nn.Module, normalization: str | None) -> SegmenterModel:
    encoder, decoder = model.encoder, model.decoder
    if not hasattr(encoder, "blocks") or not hasattr(encoder, "patch_embed"):
        _refuse(f"the encoder {type(encoder).__name__} is not a ViT: no patch_embed or no blocks")
    shape = _shape(encoder)
    mask = hasattr(decoder, "cls_emb")
    if not mask and not isinstance(getattr(decoder, "head", None), nn.Linear):
        _refuse(f"{type(decoder).__name__} is neither a linear decoder nor a mask transformer")
    mean, std = _statistics(encoder, normalization)
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
        ours = create_model_from_config(config, "reference")
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


def _encoder(model: nn.Module, normalization: str | None) -> VisionTransformer:
    if getattr(model, "no_embed_class", False):
        _refuse("no_embed_class: position embeddings without the class token")
    shape = _shape(model)
    with torch.device("meta"):
        ours = VisionTransformer(
            d_ff=MLP_RATIO * shape["d_model"], n_cls=1000, dropout=0.0, **shape
        )
    _fill_heads(ours, model)
    _share(model, ours)
    classifies = isinstance(getattr(model, "head", None), nn.Linear)
    pool = getattr(model, "global_pool", "token")
    if classifies and pool != "token":
        _refuse(
            f"it classifies from pooled tokens (global_pool={pool!r}), ours from the class token; "
            "for its features alone, take the classifier off with reset_classifier(0)"
        )
    if classifies and getattr(getattr(model, "head_drop", None), "p", 0.0):
        _refuse("head_drop: dropout before the classifier, which ours has not")
    _regularise(ours, model)
    for block in ours.blocks:
        block.recompute = bool(getattr(model, "grad_checkpointing", False))
    ours.normalization = _statistics(model, normalization)
    _set_backend(ours, "reference")
    return ours


def _statistics(encoder: nn.Module, normalization: str | None) -> tuple:
    """Mean and std of the input, by name, by timm's description of its weights, or by family."""
    known = getattr(encoder, "pretrained_cfg", None)
    if normalization is None and isinstance(known, Mapping) and {"mean", "std"} <= known.keys():
        return tuple(known["mean"]), tuple(known["std"])
    distilled = getattr(encoder, "dist_token", None) is not None
    return NORMALIZATION[normalization or ("deit" if distilled else "vit")]


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
        _refuse(f"layer norms of one eps are needed, got {sorted(eps) or 'no nn.LayerNorm'}")
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
    heads = set()
    for block in blocks:
        attention = getattr(block, "attn", None)
        heads.add(getattr(attention, "num_heads", None) or getattr(attention, "heads", None))
    if len(heads) != 1 or None in heads:
        _refuse(f"blocks with one attention of a known number of heads are needed, got {heads}")
    return heads.pop()


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
        found = {name: getattr(module, name) for name in names if hasattr(module, name)}
        for name, dropout in found.items():
            if not isinstance(dropout, (nn.Dropout, nn.Identity)):
                _refuse(f"{name} of {type(module).__name__} is {dropout}, not a plain dropout")
        rates = {float(getattr(dropout, "p", 0.0)) for dropout in found.values()}
        if len(rates) > 1:
            _refuse(f"different rates of dropout in {type(module).__name__}: {sorted(rates)}")
        return rates.pop() if rates else 0.0

    if hasattr(ours, "dropout"):
        ours.dropout.p = p_of(theirs, "dropout", "pos_drop")
    dropped = getattr(theirs, "patch_drop", None)
    if dropped is not None and not isinstance(dropped, nn.Identity):
        _refuse(f"patches are dropped in training ({type(dropped).__name__})")
    for mine, block in zip(ours.blocks, theirs.blocks, strict=True):
        mine.attn.attn_drop.p = p_of(block.attn, "attn_drop")
        mine.attn.proj_drop.p = p_of(block.attn, "proj_drop")
        mine.mlp.drop.p = p_of(block.mlp, "drop", "drop1", "drop2")
        paths = ("drop_path", "drop_path1", "drop_path2")
        paths = [getattr(block, name) for name in paths if hasattr(block, name)]
        rates = {float(getattr(path, "drop_prob", 0.0) or 0.0) for path in paths}
        if not all(getattr(path, "scale_by_keep", True) for path in paths):
            _refuse("stochastic depth that does not scale what it keeps (scale_by_keep=False)")
        if len(rates) > 1:
            _refuse(f"different stochastic depth in the branches of a block: {sorted(rates)}")
        rate = rates.pop() if rates else 0.0
        mine.drop_path = DropPath(rate) if rate else nn.Identity()


def _rate(blocks: nn.ModuleList) -> float:
    return float(getattr(blocks[-1].drop_path, "drop_prob", 0.0))


class _Output(nn.Module):
    """Logits of a Segmenter; all tokens of an encoder, and its class logits where it has any."""

    def __init__(self, model: nn.Module, classes: bool):
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        if hasattr(model, "decoder"):
            return (model(image),)
        timm = hasattr(model, "forward_features")
        tokens = model.forward_features(image) if timm else model(image, return_features=True)
        return (tokens, model(image)) if self.classes else (tokens,)


@torch.no_grad()
def _compare(theirs: nn.Module, ours: nn.Module) -> None:
    """Run both on one image in evaluation mode, with the same drawn parameters."""
    whole = isinstance(ours, SegmenterModel)
    embed = (ours.encoder if whole else ours).patch_embed
    device = embed.proj.weight.device
    if device.type not in ("cpu", "cuda"):  # others have no float64, or, as meta, no numbers
        device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    # Products of order 1 everywhere, so that attention attends and activations bend.
    values = {
        f"model.{name}": draw(*p.shape) * p.shape[-1] ** -0.5
        if p.ndim > 1
        else 0.5 + draw(*p.shape)
        for name, p in theirs.named_parameters(remove_duplicate=False)
    }
    # A Segmenter takes any size, so a small one that also pads and resamples; timm its own alone.
    patch = embed.patch_size
    image = draw(1, 3, *((2 * patch + 1, 3 * patch) if whole else embed.image_size))
    classes = not whole and isinstance(getattr(theirs, "head", None), nn.Linear)
    training = {module: module.training for module in theirs.modules()}
    try:
        theirs.eval()
        ours.eval()
        with torch.autocast(device.type, enabled=False):
            results = [
                torch.func.functional_call(_Output(model, classes), values, (image,))
                for model in (theirs, ours)
            ]
    finally:
        for module, mode in training.items():
            module.training = mode
    for expected, got in zip(*results, strict=True):
        same = isinstance(expected, Tensor) and expected.shape == got.shape
        error = float((got - expected).abs().max() / expected.abs().max()) if same else float("inf")
        if not error <= TOLERANCE:
            _refuse(
                f"{type(theirs).__name__} has the parameters of ours but computes something else "
                f"(relative difference {error:.1e}); look at {_suspects(theirs)}"
            )


def _suspects(theirs: nn.Module) -> str:
    """What a model has that may make the difference, with names."""
    encoder = getattr(theirs, "encoder", theirs)
    attention = encoder.blocks[0].attn
    width = encoder.cls_token.shape[-1] // _heads(encoder.blocks)
    found = []
    if abs(getattr(attention, "scale", width**-0.5) * width**0.5 - 1) > 1e-6:
        found.append(f"attn.scale {attention.scale:g} where ours is {width**-0.5:g}")
    plain = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Dropout, nn.Identity)
    for name, module in theirs.named_modules():
        leaf = not any(module.children())
        exact = isinstance(module, nn.GELU) and module.approximate == "none"
        if leaf and not exact and not isinstance(module, plain) and "drop" not in name:
            found.append(f"{name}, {module}")
    found.append(f"the order of operations in {type(encoder.blocks[0]).__name__}")
    return some(found)
