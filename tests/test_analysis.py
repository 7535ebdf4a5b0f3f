"""The analyses against plain definitions, their memory, their pictures, and their commands."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triton_cases import DEVICE, on_device
from typer.testing import CliRunner

from segmenter_fast import SegmenterModel, predict, reference
from segmenter_fast import analysis as analysis_module
from segmenter_fast.analysis import (
    PatchGrid,
    _attention_distances,
    attention_rows,
    class_embedding_projection,
    compare_labels,
    mean_attention_distance,
    svd_projection,
    uniform_attention_distance,
    whole_view,
)
from segmenter_fast.cli import app
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.figures import (
    _figure,
    _name_points,
    attended_area_figure,
    attention_overlay,
    attention_page,
    class_embedding_figure,
    comparison_page,
    mark_patch,
)
from segmenter_fast.variants import create_model_from_config

NAMES = ("grass", "roof, tiles", "sky")
PALETTE = ((10, 200, 30), (200, 20, 20), (90, 160, 250))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed=0, **changes) -> SegmenterModel:
    """A random model whose attention is far from even."""
    fields = {
        "n_cls": 3,
        "image_size": (32, 48),
        "patch_size": 8,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "decoder_n_layers": 2,
        "window_size": 32,
        "window_stride": 32,
        "class_names": NAMES,
        "palette": PALETTE,
    }
    torch.manual_seed(seed)
    model = create_model_from_config(SegmenterConfig(**fields | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    return model


def images(height=40, width=56, seed=1):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def photo(path=None, height=40, width=56, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if path is not None:
        image.save(path)
    return image


# --- Rows of attention ---------------------------------------------------------------------------

KINDS = {
    "vit": {},
    "deit": {"distilled": True, "patch_size": 16},
    "linear": {"decoder": "linear", "decoder_n_layers": 0},
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_attention_map(kind, backend):
    model = tiny(**KINDS[kind])
    model.backend = backend
    x = images(37, 61).repeat(2, 1, 1, 1)
    for decoder in (False, True) if kind != "linear" else (False,):
        whole = model.get_attention_map_dec if decoder else model.get_attention_map_enc
        for layer in range(2):
            with torch.inference_mode():
                expected = whole(x, layer)
            queries = [0, 5, expected.shape[2] - 1]
            rows = attention_rows(model, x, layer, queries, decoder)
            torch.testing.assert_close(rows, expected[:, :, queries], rtol=0, atol=1e-6)
            torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 3))


@on_device
def test_triton_backend():
    """In Triton's interpreter, or on a GPU, where everything is on the device."""
    model, x = tiny(n_layers=2), images(16, 24)

    def analyses():
        yield attention_rows(model, x, 1, [0, 3])
        yield attention_rows(model, x, 1, [6], decoder=True)
        yield mean_attention_distance(model, [x])
        yield torch.pdist(class_embedding_projection(model, x).coordinates)

    expected = list(analyses())
    model, x = model.to(DEVICE), x.to(DEVICE)
    model.backend = "triton"
    for ours, theirs in zip(analyses(), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)


def test_rows_equal_the_specification():
    """reference.py shares no code with the modules."""
    model = tiny()
    x, state = images(32, 48), model.state_dict()
    encoder = reference.encoder_attention(x, state, model.config, 2)
    decoder = reference.decoder_attention(x, state, model.config, 1)
    torch.testing.assert_close(attention_rows(model, x, 2, [7]), encoder[:, :, [7]])
    torch.testing.assert_close(attention_rows(model, x, -1, [7]), encoder[:, :, [7]])
    torch.testing.assert_close(attention_rows(model, x, 1, [25], True), decoder[:, :, [25]])


def test_rows_ignore_training_mode():
    model = tiny(decoder_dropout=0.5, drop_path_rate=0.5)
    expected = attention_rows(model, images(), 1, [0], decoder=True)
    model.train()
    model.encoder.norm.eval()
    torch.testing.assert_close(attention_rows(model, images(), 1, [0], decoder=True), expected)
    assert model.training and model.decoder.training and not model.encoder.norm.training


def test_rows_of_a_half_precision_model_are_float32():
    model = tiny().bfloat16()
    rows = attention_rows(model, images().bfloat16(), 0, [0])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 4, 1))


@pytest.mark.parametrize("layer", [3, -4])
def test_rows_reject_a_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\)"):
        attention_rows(tiny(), images(), layer, [0])


@pytest.mark.parametrize("query", [-1, 36])
def test_rows_reject_a_token_that_is_not_there(query):
    with pytest.raises(ValueError, match=r"queries must be in \[0, 36\)"):
        attention_rows(tiny(), images(), 0, [query])


def test_rows_reject_models_without_attention():
    with pytest.raises(ValueError, match="DecoderLinear has neither attention"):
        attention_rows(tiny(**KINDS["linear"]), images(), 0, [0], decoder=True)
    model = tiny()
    model.encoder = torch.nn.Identity()
    with pytest.raises(TypeError, match="VisionTransformer, got Identity"):
        attention_rows(model, images(), 0, [0])


def test_rows_reject_damaged_weights():
    model = tiny()
    with torch.no_grad():
        model.encoder.blocks[1].attn.qkv.bias[0] = math.nan
    with pytest.raises(ValueError, match="attention of layer 1 has values that are NaN"):
        attention_rows(model, images(), 1, [0])
    with pytest.raises(ValueError, match="attention of layer 1 has values that are NaN"):
        mean_attention_distance(model, [images()])


def peak_bytes(run) -> int:
    """Most bytes that PyTorch's CPU allocator held at a time, above what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = np.cumsum([size for _, size in changes])
    return int(held.max())


def test_memory_is_linear_in_the_number_of_patches():
    """Neither one query nor the attended area ever holds a layer's N x N attention."""
    model = tiny(d_model=16, n_layers=2, n_heads=4, image_size=(64, 64))
    x = images(8 * 36, 8 * 40)
    one_head = 4 * (36 * 40) ** 2
    with torch.inference_mode():
        whole = peak_bytes(lambda: model.get_attention_map_enc(x, 1))
    assert whole > 4 * one_head  # the measure sees what is to be avoided
    assert peak_bytes(lambda: attention_rows(model, x, 1, [3])) < one_head / 4
    assert peak_bytes(lambda: attention_rows(model, x, 1, [3], decoder=True)) < one_head / 4
    assert peak_bytes(lambda: mean_attention_distance(model, [x], block_size=16)) < one_head / 2


# --- Attended area -------------------------------------------------------------------------------


def test_mean_attention_distance_is_its_definition():
    """Query by query and key by key, on sides that are not whole patches, over two sizes."""
    model = tiny(distilled=True)
    views, expected = [images(21, 30), images(40, 13)], torch.zeros(3, 4, dtype=torch.float64)
    for view, (rows, columns) in zip(views, ((3, 4), (5, 2)), strict=True):
        for layer in range(3):
            with torch.inference_mode():
                weights = model.get_attention_map_enc(view, layer)[0, :, 2:, 2:].double()
            for head in range(4):
                total = 0.0
                for i in range(rows * columns):
                    row = weights[head, i] / weights[head, i].sum()
                    for j in range(rows * columns):
                        down, along = i // columns - j // columns, i % columns - j % columns
                        total += float(row[j]) * 8 * math.hypot(down, along)
                expected[layer, head] += total / (rows * columns) / 2
    for block_size in (1, 5, 64):
        result = mean_attention_distance(model, views, block_size=block_size)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5  # heads differ, so that a mixed-up order would show


def test_even_attention_has_the_closed_form():
    model = tiny()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.qkv.weight.zero_()
    for rows, columns in ((1, 9), (7, 1), (4, 6)):
        view = images(8 * rows, 8 * columns)
        expected = uniform_attention_distance((rows, columns), 8)
        result = mean_attention_distance(model, [view], block_size=5)
        torch.testing.assert_close(result, torch.full_like(result, expected), rtol=1e-5, atol=0)
    assert uniform_attention_distance((1, 9), 8) == pytest.approx(8 * (81 - 1) / 27)
    assert uniform_attention_distance((7, 1), 8) == pytest.approx(8 * (49 - 1) / 21)
    places = [(i, j) for i in range(4) for j in range(6)]
    pairs = [math.dist(a, b) for a in places for b in places]
    assert uniform_attention_distance((4, 6), 16) == pytest.approx(16 * np.mean(pairs))


def test_attention_to_itself_and_to_the_neighbour():
    places = 8.0 * torch.cartesian_prod(torch.arange(3), torch.arange(4))
    own = torch.eye(12)
    qkv = torch.zeros(1, 12, 3, 2, 12)
    qkv[0, :, 0] = 1e4 * own[:, None]
    qkv[0, :, 1, 0] = own
    qkv[0, :, 1, 1] = own.roll(1, 0)  # query i meets key i + 1, and the last the first
    distances = _attention_distances(qkv, places, 5)
    assert torch.equal(distances[0], torch.zeros(12))
    step = 8 * math.hypot(1, 3)  # from the end of a row to the start of the next
    expected = torch.tensor(([8.0] * 3 + [step]) * 2 + [8.0] * 3 + [8 * math.hypot(2, 3)])
    torch.testing.assert_close(distances[1], expected)


def test_mean_attention_distance_rejects_nothing_to_measure():
    with pytest.raises(ValueError, match="images is empty"):
        mean_attention_distance(tiny(), [])
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        mean_attention_distance(tiny(), [images()], block_size=0)


# --- Views ---------------------------------------------------------------------------------------


def test_whole_view_is_what_predict_shows_in_one_window():
    model, image = tiny(short_side=24), photo(height=50, width=70)
    assert whole_view(model, image).shape == (1, 3, 32, 45)  # the window's side
    assert whole_view(model, image, 20).shape == (1, 3, 20, 28)
    assert whole_view(model, image, "original").shape == (1, 3, 50, 70)
    assert whole_view(tiny(window_size=None, window_stride=None, short_side=24), image).shape == (
        *(1, 3, 24, 34),
    )
    assert torch.equal(whole_view(model, images()), images())
    view = whole_view(model, image)
    labels = predict(model, image, window_size="whole", short_side=32, size=(32, 45))
    assert torch.equal(model.labels(view)[0], labels)
    with pytest.raises(ValueError, match="short_side must be a positive int"):
        whole_view(model, image, 0)


def test_whole_view_refuses_too_many_patches(monkeypatch):
    """Before the network sees them: its time grows with the square of their number."""
    model = tiny()
    monkeypatch.setattr(analysis_module, "MAX_PATCHES", 24)
    assert whole_view(model, photo()).shape[2:] == (32, 45)  # 4 x 6 patches
    with pytest.raises(
        ValueError, match=r"40 x 56, seen at 40 x 56 pixels, has 35 patches of 8.*--s"
    ):
        whole_view(model, photo(), "original")
    with pytest.raises(ValueError, match=r"at most 24 are analysed: use a smaller short_side"):
        whole_view(model, images())


def test_patch_grid_of_a_view_that_is_not_whole_patches():
    grid = PatchGrid.of(torch.zeros(1, 3, 20, 30), 8)  # 2.5 x 3.75 patches
    assert grid == (3, 4, 0.4, 8 / 30)
    size = (200, 300)  # ten times as large
    assert grid.at((0, 0), size) == (0, 0)
    assert grid.at((79, 79), size) == (0, 0) and grid.at((80, 80), size) == (1, 1)
    assert grid.at((299, 199), size) == (2, 3)
    for outside in ((300, 0), (0, 200), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="outside of the picture: x must be in"):
            grid.at(outside, size)


# --- Class embeddings ----------------------------------------------------------------------------


def test_svd_projection_keeps_distances():
    vectors = torch.randn(7, 20, generator=torch.Generator().manual_seed(0)) + 5
    coordinates, share = svd_projection(vectors, 7)
    torch.testing.assert_close(
        torch.pdist(coordinates), torch.pdist(vectors.double()), rtol=1e-9, atol=0
    )
    assert float(share.sum()) == pytest.approx(1.0) and (share.diff() <= 0).all()
    torch.testing.assert_close(svd_projection(vectors, 2).coordinates, coordinates[:, :2])
    torch.testing.assert_close(coordinates.var(0) / coordinates.var(0).sum(), share)


def test_svd_projection_finds_a_plane_whatever_its_turn_and_place():
    generator = torch.Generator().manual_seed(3)
    plane = torch.randn(9, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    coordinates, share = svd_projection(plane @ turn[:2] + 4)
    torch.testing.assert_close(torch.pdist(coordinates), torch.pdist(plane))
    assert float(share.sum()) == pytest.approx(1.0)


def test_svd_projection_has_one_sign():
    """The largest component of an axis is positive, however the vectors lie."""
    for seed in range(8):
        vectors = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)).double()
        coordinates, _ = svd_projection(vectors, 4)
        axes = (vectors - vectors.mean(0)).T @ coordinates  # (10, 4), each along its axis
        assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(svd_projection(vectors[order], 4)[0], coordinates[order])


def test_svd_projection_of_few_vectors():
    one = svd_projection(torch.ones(1, 5))
    assert torch.equal(one.coordinates, torch.zeros(1, 2).double())
    assert torch.equal(one.share, torch.zeros(2).double())
    two = svd_projection(torch.tensor([[0.0, 3.0, 0.0], [0.0, -1.0, 0.0]]))
    torch.testing.assert_close(two.coordinates, torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).double())


def test_svd_projection_rejects_bad_input():
    with pytest.raises(ValueError, match=r"vectors must be \(K, D\)"):
        svd_projection(torch.zeros(3))
    with pytest.raises(ValueError, match="dimensions must be at least 1"):
        svd_projection(torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="NaN"):
        svd_projection(torch.full((3, 2), math.nan))


def test_class_embeddings_as_learnt_and_after_the_decoder():
    model = tiny()
    learnt = class_embedding_projection(model, dimensions=3)
    expected = svd_projection(model.decoder.cls_emb[0], 3)
    torch.testing.assert_close(learnt.coordinates, expected.coordinates)

    seen = []
    hook = model.decoder.decoder_norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    after = class_embedding_projection(model.train(), images(), dimensions=3).coordinates
    hook.remove()
    classes = (seen[0].clone()[0, -3:] @ model.decoder.proj_classes).double().detach()
    classes = classes / classes.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.pdist(after), torch.pdist(classes), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="needs weights with a mask transformer"):
        class_embedding_projection(tiny(**KINDS["linear"]))


# --- Label maps ----------------------------------------------------------------------------------


def config(names=None, palette=None, n_cls=None):
    return tiny().config.replace(n_cls=n_cls or len(names), class_names=names, palette=palette)


def test_compare_labels_matches_classes_by_name():
    a = config(("sky", "road", "car"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    b = config(("road", "boat", "sky"), ((9, 9, 9), (2, 2, 2), (1, 1, 1)))
    first = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)
    second = torch.tensor([[2, 0, 1, 2]], dtype=torch.uint8)
    result = compare_labels([first, second, first], [a, b, a])
    assert result.class_names == ("sky", "road", "car", "boat")
    assert result.palette[:3] == ((1, 1, 1), (2, 2, 2), (3, 3, 3))
    assert len(set(result.palette)) == 4  # the boat's colour was the road's already
    assert [map_.tolist()[0] for map_ in result.labels] == [
        *([0, 1, 2, 1], [0, 1, 3, 0], [0, 1, 2, 1])
    ]
    assert result.counts.tolist() == [[1, 2, 1, 0], [2, 1, 0, 1], [1, 2, 1, 0]]
    assert result.agreement.tolist() == [[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]]
    assert result.unanimous.tolist() == [[True, True, False, False]]


def test_compare_labels_of_weights_without_names():
    named, bare = config(NAMES, PALETTE), config(None, None, 3)
    labels = torch.tensor([[0, 1], [2, 2]])
    result = compare_labels([labels, labels.int()], [named, bare])
    assert result.class_names == NAMES and result.palette == PALETTE
    assert result.unanimous.all()
    assert compare_labels([labels, labels], [bare, named]).class_names == ("0", "1", "2")


def test_compare_labels_rejects_what_cannot_be_compared():
    three, four = config(NAMES, PALETTE), config(None, None, 4)
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="two label maps at least"):
        compare_labels([labels], [three])
    with pytest.raises(ValueError, match="must have one size"):
        compare_labels([labels, labels.T], [three, three])
    with pytest.raises(ValueError, match=r"compared by number, but they have \[3, 4\]"):
        compare_labels([labels, labels], [three, four])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3"):
        compare_labels([labels, labels + 3], [three, three])


# --- Pictures ------------------------------------------------------------------------------------


def test_overlay_paints_the_patch_where_it_is():
    grid = PatchGrid.of(torch.zeros(1, 3, 20, 30), 8)
    weights = torch.zeros(3, 4)
    weights[0, 3] = 0.3
    grey = Image.new("RGB", (300, 200), (100, 100, 100))
    shown = np.asarray(attention_overlay(grey, weights, grid, alpha=1.0)).astype(int)
    bright = shown[:, :, 0] > 200
    expected = np.zeros((200, 300), dtype=bool)
    expected[:80, 240:] = True  # the last column reaches past the picture
    assert (bright == expected).all()
    assert (shown[~expected] == 70).all()  # bare grey picture, darkened
    bare = np.asarray(attention_overlay(grey, weights, grid, alpha=0.0))
    assert (bare == 70).all()
    assert (np.asarray(attention_overlay(grey, 0 * weights, grid)) == 70).all()
    with pytest.raises(ValueError, match=r"weights must be \(3, 4\) as the grid"):
        attention_overlay(grey, weights.T, grid)
    with pytest.raises(ValueError, match="alpha must be in"):
        attention_overlay(grey, weights, grid, alpha=1.5)


def test_overlay_grows_with_attention():
    grid = PatchGrid.of(torch.zeros(1, 3, 8, 64), 8)
    shown = attention_overlay(Image.new("RGB", (64, 8)), torch.arange(8.0)[None], grid)
    lightness = np.asarray(shown.convert("L"))[4, 4::8].astype(int)
    assert (np.diff(lightness) > 0).all()


def test_the_frame_stands_around_the_patch():
    grid = PatchGrid.of(torch.zeros(1, 3, 64, 64), 8)
    marked = np.asarray(mark_patch(Image.new("RGB", (640, 640), "white"), (2, 5), grid))
    changed = np.argwhere((marked != 255).any(2))
    assert (marked[160:240, 400:480] == 255).all()
    assert changed.min(0).tolist() == [160 - 10, 400 - 10]
    assert changed.max(0).tolist() == [239 + 10, 479 + 10]


@pytest.mark.parametrize("size", [(90, 60), (30, 120)])
def test_attention_page_has_every_map(size):
    grid = PatchGrid.of(torch.zeros(1, 3, size[1], size[0]), 8)
    maps = [(f"head {i}", torch.rand(grid.rows, grid.columns)) for i in range(7)]
    page = attention_page(Image.new("RGB", size), maps, grid, "a title " * 30, panel=100)
    tall = round(100 * size[1] / max(size))
    assert page.height > 2 * tall and page.width > 3 * round(100 * size[0] / max(size))


def test_comparison_page_shows_where_maps_differ():
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    other = labels.clone()
    other[:, 30:] = 2
    three = config(NAMES, PALETTE)
    compared = compare_labels([labels, other], [three, three])
    page = comparison_page(Image.new("RGB", (60, 40), "black"), ["A", "B"], compared)
    colours = {colour for _, colour in page.getcolors(1 << 24)}
    assert PALETTE[0] in colours and PALETTE[2] in colours and PALETTE[1] not in colours
    pixels = np.asarray(page)
    # Half of a panel of the first colour in B, all of it in A; both are in the legend, too.
    assert 40 * 90 <= (pixels == PALETTE[0]).all(2).sum() < 40 * 90 + 400


def test_figures_are_files_of_their_suffix(tmp_path):
    distances = 20 * torch.rand(3, 4).double()
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"area{suffix}"
        attended_area_figure(path, distances, 12.0, "title")
        first = path.read_bytes()
        assert first.startswith(start)
        if suffix == ".svg":  # has neither a date nor names drawn at random
            attended_area_figure(path, distances, 12.0, "title")
            assert path.read_bytes() == first
    projection = svd_projection(torch.randn(3, 5))
    class_embedding_figure(tmp_path / "c.png", projection, NAMES, PALETTE, "title")
    assert Image.open(tmp_path / "c.png").size[0] > 500
    with pytest.raises(ValueError, match="no figure format is known"):
        class_embedding_figure(tmp_path / "c.abc", projection, NAMES, PALETTE, "title")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pdf", ".png", ".png", ".svg"]


def test_names_cover_neither_each_other_nor_points():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    x, y = np.random.default_rng(0).normal(size=(2, 40)) * [[1.0], [0.2]]
    figure, axes = _figure(8, 6)
    axes.scatter(x, y)
    _name_points(figure, axes, x, y, [f"name {i}" for i in range(40)], 7)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == 40
    points = axes.transData.transform(np.stack([x, y], 1))
    for i, box in enumerate(boxes):
        assert not any(box.padded(-0.5).overlaps(other.padded(-0.5)) for other in boxes[:i])
        assert not any(box.contains(*point) for point in points)


# --- Commands ------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny().save_pretrained("mine")
    tiny(1).save_pretrained("other")
    tiny(**KINDS["linear"]).save_pretrained("linear")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        photo(f"pictures/{i}.png", 40 + 8 * i, 56, seed=i)
    return tmp_path


def run(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--patch", "55,39", "--layer", 0], "0.attention-encoder-0-patch-55-39.png"),
        (["--cls"], "0.attention-encoder-2-cls.png"),
        (["--decoder", "--patch", "0,0"], "0.attention-decoder-1-patch-0-0.png"),
        (["--decoder", "--class", "ROOF, tiles"], "0.attention-decoder-1-roof-tiles.png"),
        (["--decoder", "--class", 2, "--layer", 0], "0.attention-decoder-0-sky.png"),
        (["--decoder", "--cls"], "0.attention-decoder-1-cls.png"),
    ],
)
def test_attention_writes_beside_the_picture(here, options, name):
    text = run("attention", "pictures/0.png", "--weights", "mine", *options)
    assert name in text and "seen at 32 x 45 pixels, 4 x 6 patches of 8" in text
    large = Image.open(here / "pictures" / name).width
    assert large > 400
    run("attention", "pictures/0.png", "--weights", "mine", *options, "--panel", 100)
    assert Image.open(here / "pictures" / name).width < large
    assert len(list((here / "pictures").iterdir())) == 4


def test_attention_shows_the_rows_that_were_asked_for(here, monkeypatch):
    """From pixel to token, past the class and distillation tokens, and into the page."""
    shown = {}

    def draw(image, maps, grid, title, alpha, patch, panel):
        shown.update(maps=maps, patch=patch)
        return image

    monkeypatch.setattr("segmenter_fast.figures.attention_page", draw)
    model = tiny(distilled=True)
    model.save_pretrained("deit")
    view = whole_view(model, Image.open("pictures/0.png"))
    with torch.inference_mode():
        encoder = model.get_attention_map_enc(view, 1)[0]
        decoder = model.get_attention_map_dec(view, 0)[0]
    common = ["attention", "pictures/0.png", "-w", "deit", "-o", "a.png"]

    def check(rows):
        maps = [map_ for _, map_ in shown["maps"]]
        torch.testing.assert_close(maps[0].flatten(), rows.mean(0))
        torch.testing.assert_close(torch.stack(maps[1:]).flatten(1), rows)

    run(*common, "--patch", "30,15", "--layer", 1)  # view pixel 24, 12: row 1, column 3
    assert shown["patch"] == (1, 3)
    check(encoder[:, 2 + 6 + 3, 2:])
    run(*common, "--cls", "--layer", 1)
    assert shown["patch"] is None
    check(encoder[:, 0, 2:])
    run(*common, "--decoder", "--class", "sky", "--layer", 0)
    check(decoder[:, 24 + 2, :24])
    assert shown["maps"][1][0] == f"head 0, {100 * decoder[0, 26, :24].sum():.0f} %"
    run(*common, "--decoder", "--cls", "--layer", 0)
    for title, map_ in shown["maps"]:
        number = NAMES.index(title.rsplit(", ", 1)[0])
        torch.testing.assert_close(map_.flatten(), decoder[:, 24 + number, :24].mean(0))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "give one of --patch X,Y, --cls and"),
        (["--cls", "--patch", "1,1"], 2, "give one of --patch X,Y, --cls and"),
        (["--class", "sky"], 2, "add --decoder"),
        (["--decoder", "--class", "sly"], 2, "did you mean sky?"),
        (["--decoder", "--class", "3"], 2, "the weights know no class '3': grass"),
        (["--patch", "1"], 2, "expected two numbers X,Y, got '1'"),
        (["--patch", "a,b"], 2, "expected two numbers X,Y"),
        (["--patch", "56,0"], 1, "pixel 56,0 is outside of the picture"),
        (["--cls", "--layer", "3"], 1, "layer must be in [0, 3)"),
        (["--cls", "--short-side", "0"], 2, "expected a number of pixels or 'original'"),
        (["--cls", "--output", "pictures/0.png"], 1, "is an input and would be overwritten"),
        (["--cls", "--output", "none/a.png"], 1, "no such folder: none"),
        (["--cls", "--output", "."], 1, "--output: . is a folder; give the name of a file"),
        (["--cls", "--output", "a.xyz"], 1, "no picture format is known"),
        (["--cls", "--decoder", "-w", "linear"], 1, "DecoderLinear has neither attention"),
    ],
)
def test_attention_says_what_is_wrong(here, words, status, message):
    text = run("attention", "pictures/0.png", "-w", "mine", *words, status=status)
    assert message in text, text


LONG = f"{'a' * 246}.png"  # a folder takes it, but not the longer name of a temporary file
COMMANDS = {
    "attention": ["pictures/0.png", "--cls", "-w", "mine"],
    "attended-area": ["pictures", "-w", "mine"],
    "class-embeddings": ["-w", "mine"],
    "compare": ["pictures/0.png", "-w", "mine", "other"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_found_out_first(here, name, monkeypatch):
    """Before weights are read, and by the name that was asked for."""

    def read(*args, **options):
        raise AssertionError("weights were read")

    Path("a.png").mkdir()
    Path("f").touch()
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(SegmenterModel, "from_pretrained", read)
    for output, message in (
        ("a.png", "--output: a.png is a folder"),
        ("a.xyz", "--output: no picture format is known for 'a.xyz'; name it like 'name.png'"),
        ("f/a.png", "--output: no such folder: f"),
        (LONG, f"--output: {LONG} cannot be written: File name too long"),
    ):
        text = run(name, *COMMANDS[name], "--output", output, status=1)
        assert f"error: {message}" in text and ".tmp" not in text
    if name in ("class-embeddings", "compare"):
        text = run(name, *COMMANDS[name], "-o", "b.png", "--json", "a.png", status=1)
        assert "error: --json: a.png is a folder" in text
        text = run(name, *COMMANDS[name], "-o", "b.png", "--json", "./b.png", status=1)
        assert "error: --json and --output are both b.png: give two files" in text
    assert sorted(Path().rglob("*")) == before


def test_long_thin_pictures_are_refused(here):
    """What would be tens of thousands of patches and more is no wait, and no traceback."""
    photo("pictures/thin.png", 1, 6000)
    message = "1 x 6000, seen at 32 x 192000 pixels, has 96,000 patches"
    for words in (["attention", "pictures/thin.png", "--cls"], ["attended-area", "pictures"]):
        assert message in run(*words, "-w", "mine", status=1)
    assert "thin.png: an image of" in run("attended-area", "pictures", "-w", "mine", status=1)


def test_unreadable_pictures_are_named(here):
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name, *options in (["attention", "--cls"], ["compare", "-w", "mine", "-w", "other"]):
        text = run(name, "broken.png", *options, status=1)
        assert "cannot read image broken.png" in text
        assert "image none.png does not exist" in run(name, "none.png", *options, status=1)
    assert "cannot read image broken.png" in run(
        "class-embeddings", "-w", "mine", "--image", "broken.png", status=1
    )
    assert "cannot read image broken.png" in run(
        "attended-area", "broken.png", "-w", "mine", status=1
    )


def test_attended_area_of_pictures(here):
    text = run("attended-area", "pictures", "-w", "mine", "--limit", 2, "-o", "area.png")
    content = json.loads(Path("area.json").read_text())
    model = tiny()
    views = [whole_view(model, f"pictures/{i}.png") for i in (0, 1)]
    expected = mean_attention_distance(model, views)
    torch.testing.assert_close(
        torch.tensor(content["mean_attention_distance"]).double(), expected, rtol=1e-5, atol=1e-5
    )
    grids = [(4, 6), (4, 5)]
    uniform = np.mean([uniform_attention_distance(grid, 8) for grid in grids])
    assert content["uniform"] == pytest.approx(uniform) and content["images"] == 2
    assert content["sizes"] == [[32, 37], [32, 45]] and f"{uniform:.1f}" in text
    assert Image.open("area.png").width > 500


def test_attended_area_of_sub_folders(here, monkeypatch):
    Path("years/2024").mkdir(parents=True)
    text = run("attended-area", "years", "-w", "mine", status=1)
    assert "no pictures" in text and "--recursive looks into sub-folders" in text
    photo("years/2024/a.png")
    run("attended-area", "years", "-w", "mine", "--recursive")
    assert json.loads(Path("attended_area.json").read_text())["images"] == 1
    # Where the command runs is no earlier result.
    monkeypatch.chdir("years/2024")
    run("attended-area", "..", "-w", "../../mine", "--recursive", "-o", "../../b.svg")


def test_attended_area_does_not_read_label_maps(here):
    for part in ("images", "annotations"):
        Path(f"data/{part}/val").mkdir(parents=True)
    photo("data/images/val/a.png")
    Path("data/annotations/val/a.png").write_bytes(b"no label map")
    run("attended-area", "--dataset", "camvid", "--root", "data", "-w", "mine", "--limit", 1)
    assert json.loads(Path("attended_area.json").read_text())["sizes"] == [[32, 45]]
    text = run("attended-area", "--dataset", "camvid", "--root", "data", "--data-seed", 1, status=2)
    assert "is for --dataset scenes" in text


def test_attended_area_of_a_dataset(here):
    run("attended-area", "--dataset", "scenes", "--limit", 2, "-w", "mine", "--scene-size", "32,40")
    content = json.loads(Path("attended_area.json").read_text())
    assert content["images"] == 2 and content["sizes"] == [[32, 40]]
    assert content["source"] == "scenes, val"


def test_attended_area_needs_one_source(here):
    assert "give pictures or folders" in run("attended-area", status=2)
    assert "give pictures or folders" in run(
        "attended-area", "pictures", "--dataset", "scenes", status=2
    )
    assert "expected a figure" in run("attended-area", "pictures", "-o", "a.json", status=2)


def test_class_embeddings(here):
    run("class-embeddings", "-w", "mine", "--json", "c.json")
    content = json.loads(Path("c.json").read_text())
    expected = class_embedding_projection(tiny())
    assert list(content["coordinates"]) == list(NAMES)
    assert list(content["coordinates"].values()) == expected.coordinates.tolist()
    assert Image.open("class_embeddings.png").width > 500
    run("class-embeddings", "-w", "mine", "--image", "pictures/0.png", "-o", "after.svg")
    assert Path("after.svg").read_text().startswith("<?xml")
    assert "needs weights with a mask" in run("class-embeddings", "-w", "linear", status=1)


@pytest.mark.parametrize("words", [["--weights", "mine", "other"], ["-w", "mine", "-w", "other"]])
def test_compare(here, words):
    text = run("compare", "pictures/0.png", *words, "--json", "c.json")
    labels = [predict(tiny(seed), "pictures/0.png") for seed in (0, 1)]
    same = float((labels[0] == labels[1]).double().mean())
    content = json.loads(Path("c.json").read_text())
    assert content["weights"] == ["mine", "other"] and 0 < same < 1
    assert content["unanimous"] == content["agreement"][0][1] == pytest.approx(same)
    for number, name in enumerate(NAMES):
        assert content["pixels"][name] == [int((map_ == number).sum()) for map_ in labels]
    assert f"agree on {100 * same:.2f} %" in text
    assert Image.open("pictures/0.compare.png").height > 40
    run("compare", "pictures/0.png", *words, "--panel", 32)
    assert Image.open("pictures/0.compare.png").height < 200


def test_compare_of_three(here):
    text = run("compare", "pictures/0.png", "-w", "mine", "other", "mine", "-o", "three.png")
    assert "share of pixels that agree" in text and "100.00 %" in text
    assert "give two weights at least, got 1" in run(
        "compare", "pictures/0.png", "-w", "mine", status=2
    )


def test_diagrams_say_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["class-embeddings"], ["attended-area", "pictures"]):
        text = run(*command, "-w", "mine", status=1)
        assert 'pip install "segmenter_fast[plot]"' in text
    run("attention", "pictures/0.png", "-w", "mine", "--cls")  # needs pillow alone
    run("compare", "pictures/0.png", "-w", "mine", "other")


def test_the_page_of_the_manual(tmp_path, monkeypatch):
    """Its commands run as they are written, and draw pictures of the size that it shows."""
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).resolve().parent.parent / "docs"
    page = (docs / "analyses.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    commands = [
        line.split()[1:] for line in page.splitlines() if line.startswith("segmenter-fast ")
    ]
    drawn = [words[words.index("--output") + 1] for words in commands]
    assert drawn == re.findall(r"!\[.*?\]\((.*?)\)", page) and len(drawn) == 4
    for words, name in zip(commands, drawn, strict=True):
        run(*words)
        assert Image.open(name).size == Image.open(docs / name).size
        assert (docs / name).stat().st_size < 300_000
