"""Weights in and out of files: ours, the official folder, bundled names, the zoo and the hub.

A checkpoint is a pair of files. Ours is `config.json` + `model.safetensors`; the official code's is
`variant.yml` + `checkpoint.pth`. Whatever the source, loading has the same three steps: find the
pair, read it without running anything it contains, and compare every name and shape with the model
that the config describes before a single value is copied.
"""

import difflib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segmenter_fast.backend import check_backend
from segmenter_fast.config import NORMALIZATION, SegmenterConfig
from segmenter_fast.model import SegmenterModel
from segmenter_fast.variants import VARIANTS, create_model_from_config

logger = logging.getLogger("segmenter_fast")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OFFICIAL_CONFIG, OFFICIAL_WEIGHTS = "variant.yml", "checkpoint.pth"
BUNDLED = Path(__file__).parent / "weights"
CLASSES = Path(__file__).parent / "data" / "classes"
# 32767 class names with colours are about 2 MB; a text file beyond this is not a config.
MAX_CONFIG_BYTES = 8 * 2**20
# The parameters whose shape depends on the number of classes.
CLASS_PARAMETERS = {
    "mask_transformer": (
        "decoder.cls_emb",
        "decoder.mask_norm.weight",
        "decoder.mask_norm.bias",
    ),
    "linear": ("decoder.head.weight", "decoder.head.bias"),
}
_LISTED = 10  # names per kind of problem in an error message


class CheckpointError(RuntimeError):
    """Weights that cannot be read, are not safe to read, or do not fit the model."""


class Files(NamedTuple):
    """A checkpoint's two files; the weights' name tells the layout."""

    config: Path
    weights: Path


# --- Reading the config --------------------------------------------------------------------------


class _VariantLoader(yaml.SafeLoader):
    """YAML's plain types and `!!python/tuple`; keys are scalars and merges are refused.

    Nested aliases as keys, or merged, cost exponential time; the official files have neither.
    """

    def flatten_mapping(self, node):
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "keys must be plain words", key.start_mark
                )


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {size} bytes, more than the {MAX_CONFIG_BYTES} of any config")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error


def read_config(path: str | Path) -> SegmenterConfig:
    """Read a `config.json` of this library.

    Raises:
        ValueError: not JSON, too long, or not a config; the file is named.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        return SegmenterConfig.from_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_variant(path: str | Path, n_cls: int | None = None) -> SegmenterConfig:
    """Read an official `variant.yml`, `!!python/tuple` included, with a safe loader.

    Args:
        path: the file.
        n_cls: number of classes where the file does not say.

    Returns:
        The config, with class names and palette where the data set is known and its number of
        classes is the model's.

    Raises:
        ValueError: not YAML, a Python tag other than the tuple, or a value that no model can have.

    Source: official segm/train.py (what is written), segm/model/factory.py (how it is read).
    """
    path = Path(path)
    text = _read_text(path)
    try:
        variant = yaml.load(text, Loader=_VariantLoader)  # a SafeLoader
        return _variant_config(variant, n_cls)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path}: refused, only plain YAML and !!python/tuple are read: {error}"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _section(values: Any, name: str, required: bool = False) -> dict[str, Any]:
    section = values.get(name) if isinstance(values, dict) else None
    if section is None and not required:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"no section {name!r}: not an official variant.yml")
    return section


def _variant_config(variant: Any, n_cls: int | None) -> SegmenterConfig:
    net = _section(variant, "net_kwargs", required=True)
    decoder = _section(net, "decoder", required=True)
    data = _section(variant, "dataset_kwargs")
    inference = _section(variant, "inference_kwargs")
    shape = ("image_size", "patch_size", "d_model", "n_layers", "n_heads")
    missing = [key for key in shape if key not in net]
    if missing:
        raise ValueError(f"net_kwargs lacks {', '.join(missing)}")

    normalization = net.get("normalization", data.get("normalization", "vit"))
    if normalization not in NORMALIZATION:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATION)}; got {normalization!r}"
        )
    # The official factory takes any name that contains "linear".
    name = str(decoder.get("name"))
    name = "linear" if "linear" in name else name
    n_cls = net.get("n_cls", n_cls)
    dataset, backbone = data.get("dataset"), net.get("backbone")
    if not all(value is None or isinstance(value, str) for value in (dataset, backbone)):
        raise ValueError("dataset and backbone must be words")
    class_names, palette = dataset_classes(dataset, n_cls)
    window = inference.get("window_size", data.get("crop_size"))
    fields = {key: net[key] for key in shape} | {
        "n_cls": n_cls,
        "backbone": backbone,
        "distilled": bool(net.get("distilled", False)),
        "dropout": net.get("dropout", 0.0),
        "drop_path_rate": net.get("drop_path_rate", 0.0),
        "decoder": name,
        "mean": NORMALIZATION[normalization][0],
        "std": NORMALIZATION[normalization][1],
        "class_names": class_names,
        "palette": palette,
        "window_size": window,
        "window_stride": inference.get("window_stride", window),
        "short_side": inference.get("im_size", data.get("image_size")),
        "dataset": dataset,
    }
    for ours, theirs in (
        ("decoder_n_layers", "n_layers"),
        ("decoder_dropout", "dropout"),
        ("decoder_drop_path_rate", "drop_path_rate"),
    ):
        if theirs in decoder:
            fields[ours] = decoder[theirs]
    config = SegmenterConfig(**fields)
    return config.replace(variant=variant_name(config))


def variant_name(config: SegmenterConfig) -> str | None:
    """The paper's name of an architecture, such as "Seg-B-Mask/16"; None when it has none."""
    shape = (config.n_layers, config.d_model, config.n_heads)
    kind = (config.patch_size, config.decoder, config.distilled)
    for name, variant in VARIANTS.items():
        if variant.backbone[:3] == shape and variant[1:] == kind:
            return name
    return None


def dataset_classes(dataset: str | None, n_cls: int) -> tuple[tuple | None, tuple | None]:
    """Class names and palette of "ade20k", "cityscapes" or "pascal_context" when it has `n_cls`."""
    known = {path.stem: path for path in CLASSES.glob("*.json")}
    if dataset not in known:
        return None, None
    rows = json.loads(known[dataset].read_text(encoding="utf-8"))
    if len(rows) != n_cls:
        return None, None
    return tuple(name for name, _ in rows), tuple(tuple(colour) for _, colour in rows)


# --- Reading the weights -------------------------------------------------------------------------


class _NumpyType:
    """Stands for `numpy.dtype` while a checkpoint is read: the number types alone."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        dtype = np.dtype(str(code))
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"numpy type {code!r} in a checkpoint")
        self.dtype = dtype

    def __setstate__(self, state: tuple):
        # (version, byte order, ...): only the order says anything about a number.
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _numpy_scalar(kind: _NumpyType, data: bytes | str) -> bool | int | float:
    """Stands for numpy's scalar constructor: a Python number."""
    if isinstance(data, str):  # how Python 2's protocol spells bytes
        data = data.encode("latin1")
    if len(data) != kind.dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(data)} bytes for a {kind.dtype}")
    return np.frombuffer(data, kind.dtype)[0].item()


# Learning rates and epochs of official checkpoints can be numpy scalars. numpy's own constructors
# take whatever a file tells them to; these stand-ins know numbers and nothing else.
_SAFE_GLOBALS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_pth(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` file of tensors, containers and numbers; nothing in it can run.

    Args:
        path: a file that `torch.save` wrote.

    Returns:
        Its dict; tensors are mapped from the file where its format allows.

    Raises:
        CheckpointError: damaged, not such a file, or with anything else in it.
    """
    path = Path(path)
    with open(path, "rb") as file:  # an unreadable file is an OSError, a damaged one is not
        magic = file.read(4)
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_archive(path)
        elif magic == b"PK\x03\x04":
            raise CheckpointError(f"{path}: truncated: the archive has no end")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises weights_only=False, which is never right here.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {name[1]}" if name else "it is damaged or not written by torch.save"
        raise CheckpointError(
            f"{path}: refused, and nothing in it was run: {what}. A checkpoint holds tensors, "
            "containers and numbers alone; ask its author for a safetensors file."
        ) from error
    except Exception as error:  # a damaged file makes PyTorch raise anything
        reason = next(iter(str(error).splitlines()), "no content")
        raise CheckpointError(
            f"{path}: damaged, or not written by torch.save ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, got {type(content).__name__}")
    return content


def _check_archive(path: Path) -> None:
    """Records of a torch archive are stored: a compressed one could be of any size, or garbage."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: record {record.filename!r} is compressed")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: damaged, or another kind of file.
    """
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, or not safetensors ({error})") from error


def check_tensors(path: Path, state_dict: Any) -> dict[str, Tensor]:
    """Plain named tensors whose values are really in the file."""
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError(f"{path}: expected named tensors, got {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            raise CheckpointError(
                f"{path}: expected named tensors, got {name!r}: {type(value).__name__}"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {name} is not a plain tensor ({value.layout}, {value.device})"
            )
    claimed, size = sum(t.nbytes for t in state_dict.values()), path.stat().st_size
    if claimed > size:
        raise CheckpointError(f"{path}: holds {size} bytes but claims {claimed} bytes of tensors")
    return dict(state_dict)


def _read(files: Files) -> tuple[SegmenterConfig, dict[str, Tensor]]:
    if files.weights.suffix == ".safetensors":
        config = read_config(files.config)
        return config, check_tensors(files.weights, read_safetensors(files.weights))
    content = read_pth(files.weights)
    if "model" not in content:
        raise CheckpointError(
            f"{files.weights}: no entry 'model'; an official checkpoint has model, optimizer and "
            f"n_cls, this one has {some(map(str, content))}"
        )
    n_cls = content.get("n_cls")
    config = read_variant(files.config, n_cls=n_cls)
    if n_cls is not None and n_cls != config.n_cls:
        raise CheckpointError(
            f"{files.weights} has {n_cls} classes but {files.config} says {config.n_cls}"
        )
    return config, check_tensors(files.weights, content["model"])


# --- Comparing weights with a model --------------------------------------------------------------


def some(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless `state_dict` has exactly `model`'s names and shapes, and finite floats.

    Args:
        model: any module; it may live on the meta device.
        state_dict: name to tensor.

    Raises:
        CheckpointError: lists missing, unexpected, mis-shaped, non-float and non-finite tensors.
    """
    expected = model.state_dict()
    common = [name for name in expected if name in state_dict]
    floats = [name for name in common if state_dict[name].is_floating_point()]
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in expected],
        "mis-shaped": [
            f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if state_dict[name].shape != expected[name].shape
        ],
        "not floating point": [
            f"{name} ({state_dict[name].dtype})"
            for name in common
            if not state_dict[name].is_floating_point()
        ],
    }
    if not any(problems.values()):
        problems["with NaN or infinite values"] = non_finite({n: state_dict[n] for n in floats})
    lines = [f"  {kind}: {some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError(
            "the weights do not fit the model; nothing was loaded\n" + "\n".join(lines)
        )


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def load_state_dict_strict(
    model: nn.Module, state_dict: Mapping[str, Tensor], device: torch.device | str | None = None
) -> None:
    """Copy every value, or none: `check_state_dict`, then the copy in the parameters' precision.

    Args:
        model: any module; one on the meta device gets its memory here.
        state_dict: name to tensor; float16 and bfloat16 are widened.
        device: where a meta model shall live; ignored for others.

    Raises:
        CheckpointError: see `check_state_dict`; the model is as before.
    """
    check_state_dict(model, state_dict)
    expected = model.state_dict()
    if not any(tensor.is_meta for tensor in expected.values()):
        model.load_state_dict(dict(state_dict), strict=True)
        return
    values = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(state_dict[name])
        for name, tensor in expected.items()
    }
    model.load_state_dict(values, strict=True, assign=True)


class _Uninitialised(TorchFunctionMode):
    """Leaves out what would fill a tensor: on the meta device there is nothing to fill.

    PyTorch runs such operations on meta tensors in Python, and imports its compiler for the first.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place or func in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
            values = (*args, *kwargs.values())
            return next(value for value in values if isinstance(value, Tensor))
        return func(*args, **kwargs)


def _skeleton(
    config: SegmenterConfig, state_dict: Mapping[str, Tensor], backend: str = "auto"
) -> SegmenterModel:
    """The model without memory or initialisation, on the meta device."""
    layers = config.n_layers + config.decoder_n_layers
    if layers > len(state_dict):  # also what keeps a hostile config from being built
        raise CheckpointError(
            f"the config has {layers} layers, the weights are {len(state_dict)} tensors"
        )
    try:
        with torch.device("meta"), _Uninitialised():
            return create_model_from_config(config, backend=backend)
    except RuntimeError as error:  # sizes beyond what a tensor can have
        raise CheckpointError(f"the config describes no possible model ({error})") from error


def _with_classes(
    config: SegmenterConfig, state_dict: dict[str, Tensor], num_classes: int
) -> tuple[SegmenterConfig, dict[str, Tensor]]:
    """The class-dependent parameters drawn anew for another number of classes."""
    changed = config.with_classes(num_classes)
    # One encoder layer is enough to get at a decoder with the official initialisation.
    fresh = create_model_from_config(changed.replace(n_layers=1)).state_dict()
    names = CLASS_PARAMETERS[config.decoder]
    logger.warning(
        "%d classes instead of the checkpoint's %d: initialised anew: %s",
        num_classes,
        config.n_cls,
        ", ".join(names),
    )
    return changed, state_dict | {name: fresh[name] for name in names}


# --- Finding the files ---------------------------------------------------------------------------


def list_bundled() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def _pair(weights: Path, config: str) -> Files:
    companion = weights.with_name(config)
    for path in (weights, companion):
        if not path.is_file():
            other = companion if path is weights else weights
            raise FileNotFoundError(f"{other.name} needs {path.name} beside it: no file {path}")
    return Files(companion, weights)


def _in_folder(folder: Path) -> Files | None:
    """The pair in a folder, ours before the official one; None when there is no trace of either."""
    layouts = ((CONFIG, WEIGHTS), (OFFICIAL_CONFIG, OFFICIAL_WEIGHTS))
    # Weights decide: many tools leave a config.json behind.
    for config, weights in layouts:
        if (folder / weights).exists():
            return _pair(folder / weights, config)
    for config, weights in layouts:
        if (folder / config).exists():
            return _pair(folder / weights, config)
    return None


def _from_file(path: Path) -> Files:
    if path.suffix == ".safetensors":
        return _pair(path, CONFIG)
    if path.suffix in (".pth", ".pt"):
        return _pair(path, OFFICIAL_CONFIG)
    raise ValueError(f"{path}: weights are .safetensors or .pth files, or a folder that holds one")


def _from_hub(repo_id: str, options: Mapping[str, Any]) -> Files:
    import huggingface_hub

    config, weights = (
        Path(huggingface_hub.hf_hub_download(repo_id=repo_id, filename=name, **options))
        for name in (CONFIG, WEIGHTS)
    )
    return Files(config, weights)


def find_files(
    source: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Files:
    """Turn a path or a name into two local files, downloading them if need be.

    The order: an existing file or folder, bundled weights, the official zoo, the Hugging Face hub.

    Args:
        source: see `load_model`.
        revision, token: of the hub.
        cache_dir: where downloads are kept; None is the hub's, or the zoo's, own folder.
        force_download: fetch again what is there already.
        local_files_only: use what was downloaded before, never the network.

    Returns:
        Paths of the config and of the weights.

    Raises:
        FileNotFoundError: nothing matches, with what was tried; or one of the two files is missing.
        DownloadError: the zoo's host did not deliver.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    from segmenter_fast import zoo

    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"weights are named by a path or a str, got {type(source).__name__}")
    name = os.fspath(source)
    path = Path(name).expanduser()
    bundled = list_bundled()
    entry = None if isinstance(source, os.PathLike) else zoo.find(name)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        files = _in_folder(path)
        if files is not None:
            return files
        # A folder of pictures may be called "street" too.
        if name not in bundled and entry is None:
            raise FileNotFoundError(
                f"{path} holds neither {WEIGHTS} and {CONFIG} nor "
                f"{OFFICIAL_WEIGHTS} and {OFFICIAL_CONFIG}"
            )
    if name in bundled:
        return _pair(BUNDLED / name / WEIGHTS, CONFIG)
    if entry is not None:
        folder = zoo.download(
            entry.name, cache_dir, force=force_download, local_files_only=local_files_only
        )
        return _pair(folder / OFFICIAL_WEIGHTS, OFFICIAL_CONFIG)

    tried = [
        f"a file or folder {path}",
        f"bundled weights ({', '.join(bundled) or 'none'})",
        f"the official zoo ({', '.join(zoo.list_zoo())})",
    ]
    unpublished = {v.casefold(): v for v in VARIANTS}.get(name.casefold())
    cause = None
    if unpublished:
        tried.append(f"{unpublished} has no published weights: create_model({unpublished!r})")
    elif re.fullmatch(r"(?i)seg\W.*/\d+", name):
        tried.append("not the Hugging Face hub: this is a model's name, and no known one")
    elif isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        try:
            return _from_hub(name, options)
        except (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
        ) as error:
            cause = error
            reason = next(iter(str(error).splitlines()), "")
            tried.append(f"the Hugging Face hub ({type(error).__name__}: {reason})")
    spellings = {n.casefold(): n for n in [*bundled, *zoo.spellings()]}
    close = difflib.get_close_matches(name.casefold(), spellings, n=3)
    hint = f" Did you mean {' or '.join(repr(spellings[c]) for c in close)}?" if close else ""
    raise FileNotFoundError(
        f"no weights {name!r}.{hint} Tried:\n" + "\n".join(f"  - {line}" for line in tried)
    ) from cause


# --- Loading -------------------------------------------------------------------------------------


def load_checkpoint(
    path_or_name: str | Path,
    num_classes: int | None = None,
    map_location: torch.device | str = "cpu",
    **hub_options,
) -> tuple[SegmenterConfig, dict[str, Tensor]]:
    """Read a checkpoint and check it against the model it describes.

    Args:
        path_or_name: see `load_model`.
        num_classes: K of the returned weights; None keeps the checkpoint's.
        map_location: device of the returned tensors.
        **hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Returns:
        The config and the tensors by their official names, in the precision they are stored in.

    Raises:
        FileNotFoundError: no such checkpoint.  ValueError: a broken config or `num_classes`.
        CheckpointError: weights that are damaged, unsafe or do not fit.
    """
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ValueError(f"num_classes must be a positive int, got {num_classes!r}")
    files = find_files(path_or_name, **hub_options)
    config, state_dict = _read(files)
    try:
        check_state_dict(_skeleton(config, state_dict), state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{files.weights}: {error}") from None
    if num_classes is not None and num_classes != config.n_cls:
        config, state_dict = _with_classes(config, state_dict, num_classes)
    return config, {name: tensor.to(map_location) for name, tensor in state_dict.items()}


@torch.inference_mode(False)  # parameters made in it count no changes and can never be trained
def load_model(
    source: str | Path,
    num_classes: int | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> SegmenterModel:
    """Make a model from a checkpoint, in evaluation mode.

    Args:
        source: a folder, or the weights file in it, of ours or of the official code; the name of
            bundled weights; a name in the official zoo, such as "Seg-T-Mask/16" or
            "cityscapes/seg_large_mask"; "organisation/name" on the Hugging Face hub.
        num_classes: for fine-tuning; a number other than the checkpoint's draws the parameters that
            depend on it anew and names them in a warning.
        backend: "auto", "reference", "native" or "triton".
        device: where the model shall live; None is the CPU.
        revision, token, cache_dir, force_download, local_files_only: of downloads.

    Returns:
        The model, float32 (PyTorch's default dtype) whatever the weights are stored in.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: see `load_checkpoint`.
    """
    check_backend(backend)
    config, state_dict = load_checkpoint(
        source,
        num_classes=num_classes,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    model = _skeleton(config, state_dict, backend=backend)
    load_state_dict_strict(model, state_dict, device="cpu" if device is None else device)
    return model.eval()


# --- Saving --------------------------------------------------------------------------------------


def save_pretrained(
    model: SegmenterModel,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    model_card: str | None = None,
) -> None:
    """Write config.json and model.safetensors, whole or not at all.

    Args:
        model: with a config, as `create_model` and the loaders make it.
        directory: made if need be; files of these names are replaced.
        dtype: floating type to store; None keeps the parameters'. float16 halves the file.
        model_card: text of README.md; None leaves that file alone.

    Raises:
        OSError: the disk is full or the folder not writable; the old files are as they were.
        CheckpointError: values that are not finite, or not finite in `dtype`.
        ValueError, TypeError: a model without a config; `dtype` is not a floating type.
    """
    if model.config is None:
        raise ValueError(
            "this model has no config: give SegmenterModel(..., config=) one to save it"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    tensors = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    broken = non_finite(tensors)
    if broken:
        raise CheckpointError(
            f"not saved: NaN or infinite values{f' in {dtype}' if dtype else ''}: {some(broken)}"
        )

    def write_weights(path: Path) -> None:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS}: {error}") from error

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    texts = {CONFIG: model.config.to_json()}
    if model_card is not None:
        texts["README.md"] = model_card
    writers = {WEIGHTS: write_weights} | {
        name: lambda path, text=text: path.write_text(text, encoding="utf-8")
        for name, text in texts.items()
    }
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
        # safetensors makes files for their owner alone; the umask decides, as for the config.
        temporary[WEIGHTS].chmod(temporary[CONFIG].stat().st_mode)
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
