"""Pictures in, label maps out: the official protocol, every kind of input, every bad one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segmenter_fast import SegmenterConfig, SegmenterModel, predict
from segmenter_fast import inference as inference_module
from segmenter_fast.images import load_image
from segmenter_fast.variants import create_model_from_config

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["seg_mask_16", "seg_deit_mask_16", "seg_linear_8"]
BACKENDS = ["reference", "auto"]
TOLERANCE = 5e-4  # the stored probabilities are float16
MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
CONFIG = SegmenterConfig(
    n_cls=7,
    image_size=(32, 32),
    patch_size=8,
    d_model=32,
    n_layers=1,
    n_heads=2,
    decoder_n_layers=1,
    window_size=32,
    window_stride=20,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = create_model_from_config(CONFIG).eval()
    # The official initialisation keeps everything near zero; labels should differ between pixels.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny)


@pytest.fixture(scope="module")
def picture():
    """(H, W, 3) uint8, smooth and with three different channels."""
    small = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(3))
    large = F.interpolate(small, size=(45, 70), mode="bicubic").clamp(0, 1)[0]
    return (255 * large).round().byte().permute(1, 2, 0).numpy()


def normalised(picture):
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONFIG.mean, CONFIG.std))
    return (pixels - mean) / std


def assert_probabilities(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    assert (ours - theirs.float()).abs().max() <= tolerance


# ------------------------------------------------------------------- the official implementation
@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    with np.load(GOLDEN / request.param / "io.npz") as stored:
        keys = [key for key in stored if key.startswith(("window_", "multiscale_"))]
        values = {key: torch.from_numpy(stored[key]) for key in keys}
    return SegmenterModel.from_pretrained(GOLDEN / request.param), values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("protocol", ["window", "multiscale"])
def test_matches_official_inference(golden, backend, protocol):
    model, values = golden
    model.backend = backend
    image = values["window_image"]
    options = {}
    if protocol == "multiscale":
        height, width = image.shape[2:]
        options = {"scales": MULTISCALE, "flip": True, "size": (height - 3, width + 5)}
    labels, probabilities = predict(model, image, return_probabilities="all", **options)
    expected = values[f"{protocol}_probabilities"].float()
    assert_probabilities(probabilities, expected)
    top = expected.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-3
    assert clear.float().mean() > 0.9
    official = values[f"{protocol}_labels"]
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[clear], official[clear])

    same, top1 = predict(model, image, return_probabilities="top1", **options)
    assert_probabilities(top1, values[f"{protocol}_top_probability"])
    alone = predict(model, image, **options)
    for other in (same, alone):
        assert torch.equal(other[clear], official[clear])


# ------------------------------------------------------------------------------------- agreement
@pytest.mark.parametrize("shape", [(1, 1), (3, 60), (60, 3), (32, 32), (33, 41), (64, 100)])
@pytest.mark.parametrize("windows", [{}, {"window_size": "whole"}, {"window_size": 24}])
def test_tiles_match_reference_at_every_size(model, shape, windows):
    model = model.double()
    image = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()
    results = {}
    for backend in BACKENDS:
        model.backend = backend
        results[backend] = predict(
            model, image, scales=(1.0, 1.3), flip=True, return_probabilities="all", **windows
        )
    labels, probabilities = results["auto"]
    assert labels.shape == shape and probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities, results["reference"][1], rtol=0, atol=1e-10)
    assert torch.equal(labels, probabilities.argmax(0).byte())
    assert torch.equal(labels, results["reference"][0])
    torch.testing.assert_close(probabilities.sum(0), torch.ones(shape).double())


def test_whole_image_is_the_model_itself(model, picture):
    image = normalised(picture)
    _, probabilities = predict(
        model, image, window_size="whole", return_probabilities="all", size=image.shape[1:]
    )
    with torch.no_grad():
        expected = model(image[None])[0].softmax(0)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_flipped_image_gives_flipped_labels(model, picture):
    image = normalised(picture)
    _, one = predict(model, image, flip=True, return_probabilities="all")
    _, other = predict(model, image.flip(-1), flip=True, return_probabilities="all")
    torch.testing.assert_close(one, other.flip(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 1000])
def test_batch_size_does_not_matter(model, picture, batch_size):
    options = {"scales": (0.8, 1.0, 1.5), "flip": True, "return_probabilities": "all"}
    _, expected = predict(model, picture, batch_size=4, **options)
    _, ours = predict(model, picture, batch_size=batch_size, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_windows_are_batched_across_views(model, picture):
    sizes = []
    hook = model.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    predict(model, picture, scales=(1.0, 1.0), flip=True, batch_size=5)
    hook.remove()
    assert sum(sizes) == 4 * 6 and sizes == [5, 5, 5, 5, 4]  # 2 x 3 windows in each of four views


# --------------------------------------------------------------------------------------- options
def test_defaults_come_from_the_config(model, picture):
    assert torch.equal(
        predict(model, picture), predict(model, picture, window_size=32, window_stride=20)
    )
    # A size that is the config's has the config's stride, given or not.
    _, own = predict(model, picture, return_probabilities="all")
    _, given = predict(model, picture, window_size=32, return_probabilities="all")
    assert torch.equal(own, given)
    # A window of one's own does not take the stride of another: it stands side by side.
    _, side_by_side = predict(model, picture, window_size=16, return_probabilities="all")
    _, explicit = predict(
        model, picture, window_size=16, window_stride=16, return_probabilities="all"
    )
    assert torch.equal(side_by_side, explicit)
    model.config = model.config.replace(window_size=None, window_stride=None)
    assert torch.equal(predict(model, picture), predict(model, picture, window_size="whole"))


def test_short_side(model, picture):
    image = normalised(picture)
    resized = F.interpolate(image[None], size=(36, 56), mode="bilinear", antialias=True)
    expected = predict(model, resized, size=(45, 70), return_probabilities="all")[1]
    asked = predict(model, image, short_side=36, return_probabilities="all")[1]
    torch.testing.assert_close(asked, expected)

    model.config = model.config.replace(short_side=36)
    _, from_config = predict(model, picture, return_probabilities="all")
    torch.testing.assert_close(from_config, expected, rtol=0, atol=1e-5)
    # Network input is taken as it is, and so is a picture for which that is asked.
    _, original = predict(model, picture, short_side="original", return_probabilities="all")
    _, network = predict(model, image, return_probabilities="all")
    torch.testing.assert_close(original, network, rtol=0, atol=1e-5)
    assert (original - expected).abs().max() > 1e-3

    half = copy.deepcopy(model).bfloat16()
    assert predict(half, picture).shape == (45, 70)


def test_output_size_and_types(model, picture):
    labels, top = predict(model, picture, size=(20, 90), return_probabilities="top1")
    assert labels.shape == top.shape == (20, 90)
    assert labels.dtype == torch.uint8 and top.dtype == torch.float32
    assert int(labels.max()) < CONFIG.n_cls and len(labels.unique()) > 1
    for result in (labels, top):
        assert not result.is_inference() and not result.requires_grad


def test_modes_are_restored_and_unused(model, picture):
    expected = predict(model, picture)
    model.train()
    model.encoder.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(predict(model, picture), expected)  # dropout would change it
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="NaN"):
        predict(model, torch.full((3, 8, 8), float("nan")))
    assert [module.training for module in model.modules()] == before


def test_half_precision_model(model, picture):
    _, expected = predict(model, picture, return_probabilities="all")
    _, ours = predict(model.bfloat16(), picture, return_probabilities="all")
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().mean() < 0.05


# ---------------------------------------------------------------------------------------- inputs
def test_every_kind_of_input_is_the_same_picture(model, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    expected = predict(model, Image.fromarray(picture))
    assert expected.shape == picture.shape[:2]
    for same in (picture, tensor, tensor[None], path, str(path), np.asfortranarray(picture)):
        assert torch.equal(predict(model, same), expected)
    reversed_twice = np.ascontiguousarray(picture[..., ::-1])[..., ::-1]  # a view, as from BGR
    assert torch.equal(predict(model, reversed_twice), expected)
    _, network = predict(model, normalised(picture), return_probabilities="all")
    _, pixels = predict(model, picture, return_probabilities="all")
    torch.testing.assert_close(network, pixels, rtol=0, atol=1e-5)


def test_input_is_left_alone(model, picture):
    before = picture.copy()
    tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    network = normalised(picture)
    kept = network.clone()
    for image in (picture, tensor, network):
        predict(model, image)
    assert np.array_equal(picture, before)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), before)
    assert torch.equal(network, kept)


def test_image_modes(model, picture):
    grey = picture[..., 0]
    rgb = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    expected = predict(model, rgb)
    opaque = np.dstack((picture, np.full(grey.shape, 99, np.uint8)))
    sixteen = grey.astype(np.uint16) * 257
    for image in (
        Image.fromarray(grey),
        Image.fromarray(sixteen),
        Image.fromarray(sixteen.astype(np.int32)),
        Image.fromarray(grey).convert("LA"),
        rgb.convert("CMYK"),
    ):
        assert torch.equal(predict(model, image), expected), image.mode
    assert torch.equal(predict(model, Image.fromarray(opaque)), predict(model, picture))
    indexed = Image.fromarray(picture).quantize(16)
    coloured = predict(model, indexed.convert("RGB"))
    assert torch.equal(predict(model, indexed), coloured)
    indexed.info["transparency"] = bytes([255] * 16)
    assert torch.equal(predict(model, indexed), coloured)
    with pytest.raises(ValueError, match="mode 'F'"):
        predict(model, Image.fromarray(grey.astype(np.float32)))


def test_exif_orientation(model, picture, tmp_path):
    path = tmp_path / "turned.png"
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side: to be shown turned by 90 degrees clockwise
    image.save(path, exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert load_image(path).size == upright.size
    assert torch.equal(predict(model, path), predict(model, upright))
    # An image object is taken as it lies, so that labels match its own rows and columns.
    with Image.open(path) as opened:
        assert torch.equal(predict(model, opened), predict(model, image))


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "image must be"),
        ([[1]], TypeError, "image must be"),
        (np.zeros((4, 4), np.uint8), ValueError, r"uint8 \(H, W, 3\), got shape \(4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, r"uint8 \(H, W, 3\), got shape"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "got float32"),
        (torch.zeros(4, 4), ValueError, r"one image \(3, H, W\)"),
        (torch.zeros(4, 4, 3), ValueError, r"one image \(3, H, W\)"),
        (torch.zeros(2, 3, 4, 4), ValueError, "model.labels"),
        (torch.zeros(3, 0, 4), ValueError, "no pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "48 values that are NaN or infinite"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "48 values that are NaN or infinite"),
    ],
)
def test_rejects_bad_images(tiny, image, error, message):
    with pytest.raises(error, match=message):
        predict(tiny, image)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": 0}, ValueError, 'positive int or "whole"'),
        ({"window_size": -5}, ValueError, "window_size must be a positive int"),
        ({"window_size": "all"}, ValueError, "positive int or \"whole\", got 'all'"),
        ({"window_size": 32.0}, TypeError, "window_size must be a positive int"),
        ({"window_size": True}, TypeError, "window_size must be a positive int"),
        ({"window_size": 32, "window_stride": 33}, ValueError, "33 is larger than window_size 32"),
        ({"window_stride": 40}, ValueError, "40 is larger than window_size 32"),
        ({"window_size": "whole", "window_stride": 8}, ValueError, "8 needs windows"),
        ({"window_stride": 0}, ValueError, "window_stride must be a positive int"),
        ({"scales": ()}, ValueError, "scales is empty"),
        ({"scales": 1.0}, TypeError, "scales must be a sequence"),
        ({"scales": "1"}, TypeError, "scales must be a sequence"),
        ({"scales": (1.0, -0.5)}, ValueError, "positive and finite, got -0.5"),
        ({"scales": (0,)}, ValueError, "positive and finite, got 0"),
        ({"scales": (float("nan"),)}, ValueError, "positive and finite, got nan"),
        ({"scales": (None,)}, TypeError, "scales must be numbers"),
        ({"scales": (0.01,)}, ValueError, "leaves no pixels"),
        ({"size": 8}, ValueError, r"size must be \(H, W\)"),
        ({"size": (8, 8, 8)}, ValueError, r"size must be \(H, W\)"),
        ({"size": (0, 8)}, ValueError, "size must be a positive int"),
        ({"size": (8.5, 8)}, TypeError, "size must be a positive int"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int"),
        ({"return_probabilities": True}, ValueError, "none, top1, all; got True"),
        ({"short_side": 0}, ValueError, 'positive int or "original"'),
        ({"short_side": "auto"}, ValueError, 'positive int or "original"'),
    ],
)
def test_rejects_bad_options(tiny, options, error, message):
    with pytest.raises(error, match=message):
        predict(tiny, torch.zeros(3, 40, 40), **options)


def test_rejects_bad_models(model, picture):
    with pytest.raises(TypeError, match="model must be a SegmenterModel, got str"):
        predict("street", picture)
    with torch.no_grad():
        model.decoder.cls_emb[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the model's output has \d+ logits"):
        predict(model, picture)
    model.config = None
    with pytest.raises(ValueError, match=r"model\.config is None"):
        predict(model, picture)


def test_rejects_an_image_that_would_grow_without_bound(tiny):
    with pytest.raises(ValueError, match='window_size="whole"'):
        predict(tiny, torch.zeros(3, 1, 300_000))
    # The shorter side and the scales grow an image, too.
    for options, message in (
        (
            {"short_side": 360},
            r"1 x 4000 .* to 360 x 1440000 for a shorter side of 360; .*original",
        ),
        ({"short_side": 90, "scales": (4.0,)}, r"360 x 1440000 for a shorter .* 90 at scale 4;"),
        ({"scales": (300.0,)}, r"1 x 4000 .* to 300 x 1200000 at scale 300; use a smaller scale"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(tiny, torch.zeros(3, 1, 4000), window_size="whole", **options)
    with pytest.raises(ValueError, match="1 x 300 would have to be enlarged to 360 x 108000"):
        predict(tiny, torch.zeros(3, 1, 300), short_side=360)


def test_large_images_may_grow(monkeypatch):
    """What is refused is out of proportion, not merely large."""
    monkeypatch.setattr(inference_module, "MAX_ENLARGED_PIXELS", 1000)
    image = torch.zeros(1, 3, 40, 60)
    assert inference_module._scaled(image, 2.0, None, None, True).shape[2:] == (80, 120)
    assert inference_module._scaled(image, 1.0, 160, None, True).shape[2:] == (160, 240)
    with pytest.raises(ValueError, match="enlarged to 164 x 246"):
        inference_module._scaled(image, 1.0, 164, None, True)


def test_rejects_bad_files(tiny, picture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        predict(tiny, tmp_path / "missing.png")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(picture).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:200])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (text, cut, empty, tmp_path):
        with pytest.raises(ValueError, match=f"cannot read image .*{path.name}"):
            predict(tiny, path)


# ---------------------------------------------------------------------------------------- memory
MEMORY_SCRIPT = """
import resource, sys, torch
from segmenter_fast import predict
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.variants import create_model_from_config
torch.set_num_threads(1)
torch.manual_seed(0)
config = SegmenterConfig(n_cls=150, image_size=(512, 512), patch_size=16, d_model=64, n_layers=1,
                         n_heads=1, decoder="linear", window_size=512, window_stride=512)
model = create_model_from_config(config)
image = torch.randint(0, 256, (3, 2048, 4096), dtype=torch.uint8)
labels = predict(model, image)
assert labels.shape == (2048, 4096) and labels.dtype == torch.uint8
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
print(peak / (2**30 if sys.platform == "darwin" else 2**20))
"""


def test_memory_of_a_large_image_stays_below_2_gib():
    # All logits of this image at once would be 4.7 GiB.
    pytest.importorskip("resource")
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    gib = float(done.stdout)
    assert 0.1 < gib < 2, f"{gib:.2f} GiB resident"
