"""Reading and writing checkpoints: every layout, every way to be broken, nothing that runs."""

import collections
import json
import logging
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from segmenter_fast import SegmenterConfig, SegmenterModel, checkpoint, create_model
from segmenter_fast.checkpoint import CheckpointError, load_checkpoint, load_model

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["seg_mask_16", "seg_deit_mask_16", "seg_linear_8"]
each_golden = pytest.mark.parametrize("name", NAMES)


def tiny(**changes) -> SegmenterModel:
    fields = {"d_model": 16, "n_layers": 1, "n_heads": 2, "decoder_n_layers": 1} | changes
    return create_model("Seg-N-Mask/16", num_classes=3, image_size=32, **fields)


@pytest.fixture
def saved(tmp_path):
    """A folder of ours with a tiny model's weights, and the model."""
    model = tiny(class_names=("a", "b", "c"), palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours", model


@pytest.fixture
def official(tmp_path):
    """A writable copy of an official folder."""
    return Path(shutil.copytree(GOLDEN / "seg_mask_16", tmp_path / "official"))


def content(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_same_weights(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- The official layout -------------------------------------------------------------------------


@each_golden
def test_official_state_dict_both_ways(name, tmp_path):
    official = content(GOLDEN / name)["model"]
    model = SegmenterModel.from_pretrained(GOLDEN / name)
    assert not model.training
    ours = model.state_dict()
    assert ours.keys() == official.keys()
    for key, value in ours.items():
        assert value.dtype == torch.float32 and torch.equal(value, official[key]), key
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())

    model.save_pretrained(tmp_path)
    again = SegmenterModel.from_pretrained(tmp_path)
    assert again.config == model.config
    for key, value in again.state_dict().items():
        assert torch.equal(value, official[key]), key


def test_official_config():
    config = load_checkpoint(GOLDEN / "seg_mask_16")[0]
    assert config == SegmenterConfig(
        n_cls=7,
        image_size=(64, 64),
        patch_size=16,
        d_model=64,
        n_layers=2,
        n_heads=1,
        backbone="vit_tiny_patch16_384",
        dropout=0.0,
        drop_path_rate=0.1,
        decoder="mask_transformer",
        decoder_n_layers=2,
        decoder_dropout=0.1,
        decoder_drop_path_rate=0.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        window_size=64,
        window_stride=48,
        short_side=64,
        dataset="ade20k",
    )
    deit = load_checkpoint(GOLDEN / "seg_deit_mask_16")[0]
    assert deit.distilled and deit.mean == (0.485, 0.456, 0.406)
    linear = load_checkpoint(GOLDEN / "seg_linear_8")[0]
    assert linear.decoder == "linear" and linear.window_stride == 32


def test_published_model_gets_its_name_and_classes(tmp_path):
    variant = yaml.load((GOLDEN / "seg_mask_16/variant.yml").read_text(), checkpoint._VariantLoader)
    variant["net_kwargs"] |= {"d_model": 192, "n_layers": 12, "n_heads": 3}
    del variant["net_kwargs"]["n_cls"], variant["inference_kwargs"]
    for dataset, n_cls, first in (
        ("ade20k", 150, "wall"),
        ("cityscapes", 19, "road"),
        ("pascal_context", 60, "background"),
    ):
        variant["dataset_kwargs"]["dataset"] = dataset
        (tmp_path / "variant.yml").write_text(yaml.dump(variant))  # with !!python/tuple
        config = checkpoint.read_variant(tmp_path / "variant.yml", n_cls=n_cls)
        assert config.variant == "Seg-T-Mask/16"
        assert len(config.class_names) == len(config.palette) == n_cls
        assert config.class_names[0] == first
        # Without inference_kwargs the training crop is the window.
        assert config.window_size == config.window_stride == config.short_side == 64


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numpy_scalars_in_the_optimizer_state(official, legacy):
    stored = content(official)
    stored["optimizer"]["lr"] = np.float64(0.25)
    stored["lr_scheduler"] = {
        "base_lrs": [np.float32(0.5)],
        "last_epoch": np.int64(3),
        "swapped": np.dtype(">i2").type(258),
        "on": np.bool_(True),
    }
    path = official / "checkpoint.pth"
    torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
    read = checkpoint.read_pth(path)
    assert read["optimizer"]["lr"] == 0.25
    assert read["lr_scheduler"] == {
        "base_lrs": [0.5],
        "last_epoch": 3,
        "swapped": 258,
        "on": True,
    }
    assert_same_weights(load_checkpoint(path)[1], stored["model"])


def test_numpy_scalars_under_their_old_name(tmp_path):
    """numpy 1 wrote numpy.core, which numpy 2 calls numpy._core."""
    data = pickle.dumps({"model": np.float64(0.75)}, protocol=2)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    torch.save({"model": 0}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "old.pth", "w") as archive,
    ):
        for record in plain.namelist():
            pickled = record.endswith("data.pkl")
            archive.writestr(record, old if pickled else plain.read(record))
    assert checkpoint.read_pth(tmp_path / "old.pth") == {"model": 0.75}


def test_number_of_classes_must_agree(official):
    stored = content(official)
    torch.save(stored | {"n_cls": 8}, official / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"8 classes.*says 7"):
        load_model(official)


def test_checkpoint_without_a_model(official):
    torch.save({"state_dict": {}, "epoch": 3}, official / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"no entry 'model'.*state_dict, epoch"):
        load_model(official)
    torch.save([1, 2], official / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="expected a dict, got list"):
        load_model(official)


# --- variant.yml ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.mkdir ['{ran}']", "refused.*python/object/apply:os.mkdir"),
        ("a: !!python/name:os.system", "refused.*python/name:os.system"),
        ("a: !!python/object/new:os.mkdir ['{ran}']", "refused.*python/object/new"),
        ("? [a, b]\n: 1", "keys must be plain words"),
        ("a: &a {{b: 1}}\nc: {{<<: *a}}", "keys must be plain words"),
        ("a: [1, 2", "not YAML"),
        ("", "no section 'net_kwargs'"),
        ("just words", "no section 'net_kwargs'"),
        ("net_kwargs: {{decoder: {{name: linear}}, n_cls: 3}}", "lacks image_size, patch_size"),
        ("[" * 1500, "variant.yml"),
    ],
)
def test_variant_is_refused(tmp_path, text, message):
    path, ran = tmp_path / "variant.yml", tmp_path / "ran"
    path.write_text(text.format(ran=ran))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_variant(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("normalization: vit", "normalization: rgb", "must be one of vit, deit; got 'rgb'"),
        ("name: mask_transformer", "name: deeplab_dec", "decoder must be one of"),
        ("patch_size: 16", "patch_size: 24", "multiples of patch_size 24"),
        ("n_layers: 2\n  normal", "n_layers: two\n  normal", "n_layers must be a positive int"),
        ("dataset: ade20k", "dataset: [ade20k]", "must be words"),
    ],
)
def test_variant_with_impossible_values(official, old, new, message):
    path = official / "variant.yml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_model(official)
    assert "variant.yml" in str(error.value)


# --- Files that are broken or hostile ------------------------------------------------------------


class MakesADirectory:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Evaluates:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("hostile", [MakesADirectory, Evaluates])
def test_hostile_pickle_runs_nothing(official, tmp_path, hostile, legacy):
    ran = tmp_path / "ran"
    path = official / "checkpoint.pth"
    stored = content(official) | {"epoch": hostile(ran)}
    torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"nothing in it was run.*(mkdir|eval)") as error:
        load_model(official)
    assert not ran.exists()
    assert "weights_only" not in str(error.value)  # no advice to switch the safety off
    # The test can fail: the same file does run when it is read carelessly.
    torch.load(path, weights_only=False)
    assert ran.is_dir()


def test_hostile_raw_pickle_runs_nothing(official, tmp_path):
    path, ran = official / "checkpoint.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(MakesADirectory(ran), protocol=2))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_model(official)
    assert not ran.exists()


@pytest.mark.parametrize("value", [np.array([1.0]), np.array([None]), collections.Counter("ab")])
def test_other_objects_are_refused(official, value):
    torch.save(content(official) | {"epoch": value}, official / "checkpoint.pth")
    if isinstance(value, collections.Counter):  # PyTorch's own list has it: harmless
        load_model(official)
    else:
        with pytest.raises(CheckpointError, match="_reconstruct"):
            load_model(official)


def test_numpy_stand_ins_take_numbers_alone():
    for code in ("O8", "M8[s]", "S4", "V8", "U2"):
        with pytest.raises(pickle.UnpicklingError, match="numpy type"):
            checkpoint._NumpyType(code)
    with pytest.raises(pickle.UnpicklingError, match="3 bytes for a float64"):
        checkpoint._numpy_scalar(checkpoint._NumpyType("f8"), b"abc")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"hello world\n",
        lambda data: b"<html>404</html>",
        lambda data: data[:4],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-30],
        lambda data: data[len(data) // 2 :],
        lambda data: b"\x80\x02]q\x00.",
        lambda data: b"\x00" * 1000,
    ],
    ids="empty text html magic half tail-cut head-cut list zeros".split(),
)
def test_damaged_pth(official, damage):
    path = official / "checkpoint.pth"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth"):
        load_model(official)


def test_compressed_archive_is_refused(official):
    path = official / "checkpoint.pth"
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(official / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in archive.namelist():
            bomb.writestr(record, archive.read(record))
    os.replace(official / "bomb", path)
    with pytest.raises(CheckpointError, match="is compressed"):
        load_model(official)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(64), "claims"),
        (torch.zeros(64, device="meta"), "not a plain tensor"),
        (torch.zeros(64).to_sparse(), "not a plain tensor"),
        (1.5, "expected named tensors"),
        (torch.zeros(64, dtype=torch.int32), "not floating point"),
    ],
    ids="expanded meta sparse number integers".split(),
)
def test_tensors_that_are_not(official, value, message):
    stored = content(official)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and 0 in value.stride():
        # Every tensor a view of one number: the file is far smaller than what it claims.
        stored["model"] = {
            name: torch.zeros(1).expand(tensor.shape) for name, tensor in stored["model"].items()
        }
        stored.pop("optimizer")
    else:
        stored["model"]["encoder.norm.weight"] = value
    torch.save(stored, official / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=message):
        load_model(official)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10**6) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 68)
        + b'{"w": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 400]}}'.ljust(68),
        struct.pack("<Q", 2) + b"{}",
    ],
    ids="empty short absurd truncated not-json shape-lies no-tensors".split(),
)
def test_damaged_safetensors(saved, data):
    folder, _ = saved
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)


def test_truncated_safetensors(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" " * (checkpoint.MAX_CONFIG_BYTES + 1), "more than the"),
        ("{", "config.json"),
        ("[" * 100000, "config.json"),
        ("[]", "must hold an object"),
        ('{"n_cls": 3}', "missing keys"),
        ("\udcff", "not a text file"),
    ],
    ids="huge cut deep list keys binary".split(),
)
def test_broken_config(saved, text, message):
    folder, _ = saved
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 10**9}, "1000000001 layers"),
        ({"d_model": 2**40}, "the config describes no possible model|mis-shaped"),
        ({"image_size": [2**20, 2**20]}, "mis-shaped: encoder.pos_embed"),
        ({"n_cls": 4, "class_names": None, "palette": None}, "mis-shaped: decoder.cls_emb"),
    ],
)
def test_config_that_does_not_fit_the_weights(saved, changes, message):
    """Sizes are compared before any memory is taken."""
    folder, model = saved
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | changes))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


# --- Strictness ----------------------------------------------------------------------------------


def test_every_misfit_is_listed_and_nothing_is_loaded():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["encoder.norm.bias"], state["decoder.cls_emb"]
    state["decoder.extra"] = torch.zeros(1)
    state["encoder.pos_embed"] = torch.zeros(1, 9, 16)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_state_dict_strict(model, state)
    message = str(error.value)
    assert "missing: encoder.norm.bias, decoder.cls_emb" in message
    assert "unexpected: decoder.extra" in message
    assert "mis-shaped: encoder.pos_embed (1, 9, 16) instead of (1, 5, 16)" in message
    assert_same_weights(model.state_dict(), before)


def test_long_lists_are_cut():
    model = tiny()
    with pytest.raises(CheckpointError, match=rf"\({len(model.state_dict())} in all\)") as error:
        checkpoint.load_state_dict_strict(model, {})
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(saved, value):
    folder, model = saved
    state = load_file(folder / "model.safetensors")
    state["encoder.head.bias"][-1] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values: encoder\.head\.bias$"):
        load_model(folder)
    with torch.no_grad():
        model.encoder.norm.weight[0] = value
    with pytest.raises(CheckpointError, match=r"not saved: .*encoder\.norm\.weight"):
        model.save_pretrained(folder)


def test_loading_into_an_existing_model(saved):
    folder, model = saved
    other = tiny().double()
    config, state = load_checkpoint(folder)
    checkpoint.load_state_dict_strict(other, state)
    assert config == model.config
    assert all(value.dtype == torch.float64 for value in other.state_dict().values())
    assert_same_weights({n: v.float() for n, v in other.state_dict().items()}, model.state_dict())


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize("distilled", [False, True])
def test_skeleton_is_the_model_without_memory(decoder, distilled):
    model = tiny(decoder=decoder, distilled=distilled)
    skeleton = checkpoint._skeleton(model.config, model.state_dict())
    assert all(value.is_meta for value in skeleton.state_dict().values())
    assert repr(skeleton) == repr(model)
    checkpoint.load_state_dict_strict(skeleton, model.state_dict(), device="cpu")
    assert_same_weights(skeleton.state_dict(), model.state_dict())
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(skeleton.eval()(images), model.eval()(images))


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_model(saved[0])
    assert torch.equal(torch.rand(1), expected)


# --- Other classes -------------------------------------------------------------------------------


@each_golden
def test_num_classes_reinitialises_only_what_depends_on_it(name, caplog):
    original = content(GOLDEN / name)["model"]
    with caplog.at_level(logging.WARNING, logger="segmenter_fast"):
        model = SegmenterModel.from_pretrained(GOLDEN / name, num_classes=40)
    assert model.n_cls == model.config.n_cls == 40
    changed = {
        key
        for key, value in model.state_dict().items()
        if value.shape != original[key].shape or not torch.equal(value, original[key])
    }
    assert changed == set(checkpoint.CLASS_PARAMETERS[model.config.decoder])
    assert all(key in caplog.text for key in changed)
    if model.config.decoder == "linear":
        assert model.decoder.head.bias.abs().max() == 0
        drawn = model.decoder.head.weight
    else:
        assert torch.equal(model.decoder.mask_norm.weight, torch.ones(40))
        assert torch.equal(model.decoder.mask_norm.bias, torch.zeros(40))
        drawn = model.decoder.cls_emb
    assert 0.018 < drawn.std() < 0.022 and drawn.mean().abs() < 0.002
    assert model.labels(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 64)


def test_num_classes_drops_names_and_palette(saved):
    folder, _ = saved
    config = load_model(folder, num_classes=5).config
    assert config.class_names is None and config.palette is None


def test_same_num_classes_changes_nothing(saved, caplog):
    folder, model = saved
    with caplog.at_level(logging.WARNING, logger="segmenter_fast"):
        again = load_model(folder, num_classes=3)
    assert not caplog.records
    assert again.config.class_names == ("a", "b", "c")
    assert_same_weights(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_num_classes_must_be_a_number_of_classes(saved, value):
    with pytest.raises(ValueError, match="num_classes must be a positive int"):
        load_model(saved[0], num_classes=value)


# --- Saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    model = tiny()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    full, half = (tmp_path / kind / "model.safetensors" for kind in ("full", "half"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = load_model(tmp_path / "half")
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].to(dtype).float()), name


def test_saving_refuses_what_does_not_fit(tmp_path):
    model = tiny()
    with pytest.raises(TypeError, match="dtype must be a floating"):
        checkpoint.save_pretrained(model, tmp_path, dtype=torch.int8)
    with torch.no_grad():
        model.encoder.norm.weight[0] = 1e5
    with pytest.raises(CheckpointError, match=r"float16: encoder\.norm\.weight"):
        checkpoint.save_pretrained(model, tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.config = None
    with pytest.raises(ValueError, match="no config"):
        checkpoint.save_pretrained(model, tmp_path)


def test_model_card_and_leftovers(tmp_path):
    checkpoint.save_pretrained(tiny(), tmp_path, model_card="# Tiny\n")
    assert (tmp_path / "README.md").read_text() == "# Tiny\n"
    checkpoint.save_pretrained(tiny(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Tiny\n"
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def fail_after_writing(original):
    """Write something, then run out of space."""

    def write(self_or_tensors, *args, **options):
        original(self_or_tensors, *args, **options)
        raise OSError(28, "No space left on device")

    return write


@pytest.mark.parametrize("where", ["weights", "config"])
def test_full_disk_leaves_the_old_files(saved, monkeypatch, where):
    folder, model = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.encoder.norm.weight.add_(1)
    model.config = model.config.replace(class_names=("x", "y", "z"))
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(checkpoint, "save_file", fail_after_writing(checkpoint.save_file))
        else:
            patch.setattr(Path, "write_text", fail_after_writing(Path.write_text))
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk_is_an_oserror(tmp_path, monkeypatch):
    """The safetensors writer has an error of its own."""
    original = checkpoint.save_file

    def to_full(tensors, path, metadata):
        original(tensors, "/dev/full", metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", to_full)
    with pytest.raises(OSError, match=r"model\.safetensors|No space"):
        checkpoint.save_pretrained(tiny(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_unusual_memory_is_saved(tmp_path):
    model = tiny()
    with torch.no_grad():
        weight = model.encoder.head.weight
        weight.set_(weight.t().contiguous().t())
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert_same_weights(load_model(tmp_path).state_dict(), model.state_dict())


# --- Finding -------------------------------------------------------------------------------------


def test_the_ways_to_name_a_file(saved, official, monkeypatch):
    folder, _ = saved
    for source in (folder, str(folder), folder / "model.safetensors"):
        assert load_checkpoint(source)[0].n_cls == 3
    for source in (official, official / "checkpoint.pth"):
        assert load_checkpoint(source)[0].n_cls == 7
    monkeypatch.chdir(folder.parent)
    assert load_checkpoint("ours")[0].n_cls == 3
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_checkpoint("~/ours")[0].n_cls == 3


def test_a_stray_config_does_not_hide_official_weights(official):
    (official / "config.json").write_text("{}")
    assert load_checkpoint(official)[0].n_cls == 7


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_companion_is_missing(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {name} beside it"):
        load_model(folder)


@pytest.mark.parametrize("name", ["variant.yml", "checkpoint.pth"])
def test_official_companion_is_missing(official, name):
    (official / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {name} beside it"):
        load_model(official)


def test_folders_and_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_model(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth"):
        load_model(tmp_path / "photo.jpg")
    with pytest.raises(TypeError, match="got int"):
        load_model(3)


def test_bundled_name(saved, tmp_path, monkeypatch):
    folder, model = saved
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "weights")
    shutil.copytree(folder, tmp_path / "weights" / "street")
    (tmp_path / "weights" / "unfinished").mkdir()
    assert checkpoint.list_bundled() == ["street"]
    # A folder of pictures with the same name is in nobody's way.
    (tmp_path / "here" / "street").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert_same_weights(load_model("street").state_dict(), model.state_dict())
    with pytest.raises(FileNotFoundError, match="Did you mean 'street'"):
        load_model("streat")


def test_no_network_is_asked_for_a_mistyped_model(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(FileNotFoundError, match="Did you mean 'Seg-T-Mask/16'"):
        load_model("Seg-T-Mask/61")
    with pytest.raises(FileNotFoundError, match=r"no published weights: create_model\('Seg-S/16'"):
        load_model("seg-s/16")
    with pytest.raises(FileNotFoundError, match=r"no weights 'missing\.pth'"):
        load_model("missing.pth")


def test_hub(saved, monkeypatch):
    folder, model = saved
    asked = []

    def hf_hub_download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    again = SegmenterModel.from_pretrained(
        "someone/tiny", revision="v1", token=False, cache_dir="cache", force_download=True
    )
    assert_same_weights(again.state_dict(), model.state_dict())
    assert [(repo, file) for repo, file, _ in asked] == [
        ("someone/tiny", "config.json"),
        ("someone/tiny", "model.safetensors"),
    ]
    assert asked[0][2] == {
        "revision": "v1",
        "token": False,
        "cache_dir": "cache",
        "force_download": True,
        "local_files_only": False,
    }


def test_hub_has_no_such_model(monkeypatch):
    def hf_hub_download(**options):
        raise LocalEntryNotFoundError("cannot find the requested files\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match="no weights 'someone/nothing'") as error:
        load_model("someone/nothing")
    message = str(error.value)
    assert "a file or folder someone/nothing" in message
    assert "bundled weights" in message
    assert "ade20k/seg_tiny_mask" in message
    assert "hub (LocalEntryNotFoundError: cannot find the requested files)" in message


def test_unknown_backend_before_anything_is_read():
    with pytest.raises(ValueError, match="backend must be one of"):
        load_model("nowhere", backend="fast")


def test_backend_and_device(saved):
    model = load_model(saved[0], backend="reference", device="cpu")
    assert model.backend == "reference"
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_push_to_hub_uploads_both_files(tmp_path, monkeypatch):
    from huggingface_hub import hub_mixin

    uploads = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "address"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = create_model("Seg-N/8", 3, 32)
    assert model.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="org/name") == "address"
    assert uploads == [("org/name", ["config.json", "model.safetensors"])]
    with pytest.raises(TypeError, match="private"):
        model.save_pretrained(tmp_path / "m", private=True)


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        create_model("Seg-N/8", 3, 32).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
