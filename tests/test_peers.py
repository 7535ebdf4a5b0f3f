"""The benchmarks' peers: the right sizes, the right answers, and a reason where they do not run."""

import functools
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_labels

from segmenter_fast import create_model, reference

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("harness", "records", "peers.deeplab", "peers.setr", "peers.hugging_face")
MODULES += ("peers.engines", "bench_model", "bench_peers", "linear_cases", "bench_layer_norm")
MODULES += ("bench_mask_product", "bench_patch_embed", "bench_upsample_probabilities")
MODULES += ("bench_attention", "bench_confusion", "bench_upsample_argmax", "bench_windows")
MODULES += ("bench_upsample_cross_entropy", "bench_train")
K = 5


def forget():
    for name in [n for n in sys.modules if n in MODULES or n.split(".")[0] == "peers"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules by the last part of their names, imported as the benchmarks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        patch.delitem(sys.modules, "linear_cases", raising=False)  # tests/ has one, too
        forget()
        yield {name.split(".")[-1]: importlib.import_module(name) for name in MODULES}
        forget()


def count(module):
    return sum(p.numel() for p in module.parameters())


def ran(module, images):
    with torch.inference_mode():
        return module.eval()(images)


def settle(model):
    """Give batch norms statistics and scales that a wrong order would not survive."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


# ------------------------------------------------------------------------------------- DeepLabv3+
def test_deeplab_has_the_published_parameters(modules):
    with torch.device("meta"):
        model = modules["deeplab"].DeepLabV3Plus(21)
    # torchvision's documentation: ResNet-101 has 44,549,160 with its 1000 classes on 2048 features.
    assert count(model.encoder) == 44_549_160 - (2048 + 1) * 1000
    # And its DeepLabv3 on ResNet-101 60,996,202: a 3 x 3 layer and a classifier behind the ASPP,
    # and an auxiliary head on 1024 channels.
    norm, classifier = 2 * 256, (256 + 1) * 21
    head, auxiliary = 9 * 256**2 + norm + classifier, 9 * 1024 * 256 + norm + classifier
    assert count(model.encoder) + count(model.aspp) + head + auxiliary == 60_996_202
    # DeepLabv3+: low-level features to 48 channels, then two 3 x 3 layers.
    assert count(model.low) == 256 * 48 + 2 * 48
    assert count(model.decoder) == 9 * (256 + 48) * 256 + 9 * 256**2 + 2 * norm
    assert count(model.classifier) == classifier


def test_dilation_computes_what_strides_leave_out(modules):
    """Every second (fourth) feature of the dilated network is one of the strided network."""
    deeplab = modules["deeplab"]
    torch.manual_seed(0)
    nets = {s: deeplab.DilatedResNet((1, 2, 2, 2), 4, s) for s in (32, 16, 8)}
    state = settle(nets[32]).state_dict()
    x = torch.randn(1, 3, 96, 64)
    low, expected = ran(nets[32], x)
    assert low.shape == (1, 16, 24, 16) and expected.shape == (1, 128, 3, 2)
    for stride in (16, 8):
        nets[stride].load_state_dict(state)
        features = ran(nets[stride], x)[1]
        assert features.shape[2:] == (96 // stride, 64 // stride)
        step = 32 // stride
        torch.testing.assert_close(features[:, :, ::step, ::step], expected)


@pytest.mark.parametrize("stride", [16, 8])
def test_deeplab_runs(modules, stride):
    model = modules["deeplab"].DeepLabV3Plus(K, stride, (1, 1, 1, 1), width=4, channels=8)
    logits = ran(model, torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, K, 16, 24) and logits.std() > 0
    dilations = [branch[0].dilation[0] for branch in model.aspp.branches]
    assert dilations == {16: [1, 6, 12, 18], 8: [1, 12, 24, 36]}[stride]


def test_deeplab_refuses_other_strides(modules):
    with pytest.raises(ValueError, match="16 or 8, got 32"):
        modules["deeplab"].DeepLabV3Plus(K, output_stride=32)


# ------------------------------------------------------------------------------------- SETR
@pytest.mark.parametrize("name, torchvision", [("ViT-B", 86_567_656), ("ViT-L", 304_326_632)])
def test_setr_has_the_published_parameters(modules, name, torchvision):
    setr = modules["setr"]
    with torch.device("meta"):
        model = setr.SETRPUP(150, **setr.VIT[name])
    # torchvision's documentation counts a class token, 197 positions and 1000 classes.
    width = setr.VIT[name]["d_model"]
    body = torchvision - (1 + 197) * width - (width + 1) * 1000
    # Section 3.3: four 3 x 3 convolutions to 256 channels, here each with a batch norm.
    decoder = 9 * (width + 3 * 256) * 256 + 4 * (256 + 2 * 256) + (256 + 1) * 150
    assert count(model) == body + 32**2 * width + decoder


def test_a_block_is_the_references(modules):
    torch.manual_seed(0)
    block = modules["setr"].Block(12, 3)
    p = {f"b.{k}": v for k, v in block.state_dict().items()}
    for ours, theirs in (("qkv", "attn.qkv"), ("proj", "attn.proj")):
        p |= {f"b.{theirs}.{s}": p[f"b.{ours}.{s}"] for s in ("weight", "bias")}
    for i, name in ((0, "fc1"), (2, "fc2")):
        p |= {f"b.mlp.{name}.{s}": p[f"b.mlp.{i}.{s}"] for s in ("weight", "bias")}
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ran(block, x), reference.block(x, p, "b", heads=3, eps=1e-6))


def test_setr_upsamples_progressively(modules):
    torch.manual_seed(0)
    model = settle(modules["setr"].SETRPUP(K, 64, 16, 12, 2, 3, channels=8))
    x = torch.randn(2, 3, 64, 64)
    seen = []
    for layer in model.decoder:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    logits = ran(model, x)
    assert [tuple(y.shape[2:]) for y in seen] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    # As in the paper: upsample first, then classify every pixel.
    full = F.interpolate(seen[-1], size=(64, 64), mode="bilinear")
    torch.testing.assert_close(
        F.interpolate(logits, size=(64, 64), mode="bilinear"), model.classifier(full)
    )


# ------------------------------------------------------------------------------------- transformers
def test_transformers_has_the_published_parameters(modules):
    pytest.importorskip("transformers")
    peers = modules["hugging_face"]
    # Millions. SegFormer's table 1; Swin's table 3, which counts the auxiliary head.
    segformer = {"B0": 3.8, "B1": 13.7, "B2": 27.5, "B3": 47.3, "B4": 64.1, "B5": 84.7}
    upernet = {"Swin-T": 60, "Swin-S": 81, "Swin-B": 121, "Swin-L": 234}
    assert (segformer.keys(), upernet.keys()) == (peers.SEGFORMER.keys(), peers.SWIN.keys())
    with torch.device("meta"):
        for name, millions in segformer.items():
            assert round(count(peers.SegFormer(150, name)) / 1e6, 1) == millions, name
        for name, millions in upernet.items():
            model = peers.UPerNetSwin(150, name, auxiliary=True)
            assert round(count(model) / 1e6) == millions, name


def test_segformer_runs(modules):
    pytest.importorskip("transformers")
    model = modules["hugging_face"].SegFormer(
        K, hidden_sizes=[8, 16, 40, 64], depths=[1] * 4, decoder_hidden_size=8
    )
    assert ran(model, torch.randn(2, 3, 64, 96)).shape == (2, K, 16, 24)


def test_upernet_ends_where_its_logits_are_made(modules):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4]}
    model = modules["hugging_face"].UPerNetSwin(K, **small, window_size=4, head_hidden_size=8)
    x = torch.randn(1, 3, 64, 96)
    logits = ran(model, x)
    assert logits.shape == (1, K, 16, 24)
    theirs = ran(model.model, x).logits
    torch.testing.assert_close(
        F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False), theirs
    )


# ------------------------------------------------------------------------------------- engines
@pytest.fixture(scope="module")
def tiny():
    """A model, images, and the logits that the reference gives them."""
    torch.manual_seed(0)
    model = create_model(
        "Seg-T-Mask/16", K, image_size=48, d_model=64, n_layers=2, n_heads=2
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and class tokens start at zero
    x = torch.randn(1, 3, 48, 64)
    return model, x, reference.patch_logits(x, model.state_dict(), model.config).detach()


@pytest.fixture(scope="module")
def files(modules, tiny, tmp_path_factory):
    """ONNX files: of patch logits, and of label maps."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    model, x, _ = tiny
    folder = tmp_path_factory.mktemp("onnx")
    export = modules["engines"].export_onnx
    return [export(model, x, folder / f"{full}.onnx", full) for full in (False, True)]


def test_plain_is_the_same_model_in_pytorch_alone(modules, tiny):
    model, x, expected = tiny
    plain = modules["engines"].plain(model)
    assert model.backend == "auto" and plain.backend == "reference"
    with torch.inference_mode():
        graph = torch.export.export(modules["engines"].PatchLogits(plain), (x,)).graph
        torch.testing.assert_close(plain.patch_logits(x).grid, expected, rtol=1e-4, atol=1e-5)
        labels = modules["engines"].Labels(plain)(x)
    called = {str(node.target) for node in graph.nodes}
    assert not [name for name in called if "segmenter_fast" in name]
    assert any("scaled_dot_product_attention" in name for name in called)
    assert_labels(labels, expected, (48, 64), slack=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_are_upsampled_with_classes_last(modules, tiny, dtype, monkeypatch):
    model, x, _ = tiny
    engines = modules["engines"]
    plain = engines.plain(model).to(dtype)
    with torch.inference_mode():
        logits = engines.PatchLogits(plain)(x.to(dtype)).float().contiguous()
        expected = F.interpolate(logits, size=(48, 64), mode="bilinear").argmax(1)
        seen = []
        interpolate = F.interpolate
        monkeypatch.setattr(F, "interpolate", lambda t, **o: seen.append(t) or interpolate(t, **o))
        labels = engines.Labels(plain)(x.to(dtype))
    assert torch.equal(labels.long(), expected)
    assert seen[-1].dtype == torch.float32
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("engine", ["OnnxRuntime", "OpenVino"])
def test_engines_are_right(modules, tiny, files, engine):
    pytest.importorskip(engine.lower())
    _, x, expected = tiny
    kind = getattr(modules["engines"], engine)
    run = kind(files[0])
    for call in (run, run.fresh, run):
        torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-4)
    other = x.flip(3)
    assert not torch.allclose(run(other), expected, atol=0.1)  # it does read its input
    assert_labels(kind(files[1])(x), expected, (48, 64), slack=1e-3)


def test_openvino_in_bfloat16(modules, tiny, files):
    pytest.importorskip("openvino")
    _, x, expected = tiny
    try:
        run = modules["engines"].OpenVino(files[0], "bf16")
    except modules["harness"].NotRun as reason:
        pytest.skip(str(reason))
    error = float((run(x) - expected).abs().max())
    assert 1e-4 < error < 0.1 * float(expected.abs().max())


def test_openvino_in_int8(modules, tiny, files, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    _, x, expected = tiny
    quantise, kind = modules["engines"].quantise, modules["engines"].OpenVino
    path = quantise(files[0], [x, x.flip(2)], tmp_path / "int8.xml")
    run = kind(path, "int8")
    # The weights are stored in 8 bits: it did quantise.
    assert path.with_suffix(".bin").stat().st_size < 0.5 * files[0].stat().st_size
    error = float((run(x) - expected).abs().max())
    assert 1e-3 < error < 0.5 * float(expected.abs().max())
    labels = expected.argmax(1)
    assert (run(x).argmax(1) == labels).double().mean() > 0.7


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino", "nncf"])
def test_absent_engines_keep_their_rows(modules, tiny, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    engines, (model, x, _) = modules["engines"], tiny
    build = {
        "onnxruntime": lambda: engines.OnnxRuntime(Path("absent")),
        "openvino": lambda: engines.OpenVino(Path("absent")),
        "nncf": lambda: engines.quantise(Path("absent"), [x], Path("absent.xml")),
    }.get(package, lambda: engines.export_onnx(model, x, Path("absent")))
    if package in ("onnxscript", "nncf"):
        pytest.importorskip("onnx" if package == "onnxscript" else "openvino")
    prepare = modules["harness"].Prepared(build)
    (row,) = modules["harness"].compare({"engine": prepare})
    assert row.not_run == f'needs {package}: pip install "segmenter_fast[bench]"'


# ------------------------------------------------------------------------------------- contests
class Contest:
    """The `contest` fixture, if it ran nothing."""

    def __call__(self, case, contestants, check=None, rounds=11, peers=1, **options):
        self.case, self.contestants, self.check = case, contestants, check
        self.names, self.peers, self.rounds = list(contestants), list(contestants)[:peers], rounds
        self.options = options


def not_compiled(*arguments, **options):
    return lambda: None


HEAVY = ("attention", "confusion", "upsample_cross_entropy", "upsample_probabilities")
SMALL = {"N_CLS": 5, "GRID": 4, "SIZE": (64, 64), "TOKENS": 17}
"""Constants of the heavy benchmarks, which compute what is right beforehand."""


@pytest.mark.parametrize(
    "module, test, arguments",
    [
        ("layer_norm", "test_layer_norm", {"with_compile": False, "width": 8, "gradient": True}),
        ("mask_product", "", {"with_compile": False, "width": 8, "gradient": False}),
        ("patch_embed", "", {"with_compile": False, "width": 8, "gradient": False}),
        ("upsample_probabilities", "test_probabilities", {"top1": False, "batch": 1}),
        ("upsample_probabilities", "test_probabilities", {"top1": True, "batch": 2}),
        ("upsample_probabilities", "test_probabilities_with_gradient", {"top1": True}),
        ("attention", "", {"heads": 1, "gradient": False, "dtype": torch.bfloat16}),
        ("confusion", "test_label_map", {"batch": 1}),
        ("confusion", "test_patch_logits", {"batch": 1}),
        ("upsample_argmax", "test_labels", {"kind": "noise", "batch": 1}),
        (
            "upsample_cross_entropy",
            "test_cross_entropy",
            {"n_cls": 5, "grid": 4, "logits": "noise", "labels": "regions", "backward": True},
        ),
        ("windows", "test_labels", {"name": "one view", "count": 1}),
        ("train", "test_training_step", {}),
    ],
)
def test_whoever_is_not_ours_is_a_peer_or_a_yardstick(
    modules, monkeypatch, module, test, arguments
):
    bench, contest = modules[f"bench_{module}"], Contest()
    for name in SMALL if module in HEAVY else ():
        monkeypatch.setattr(bench, name, SMALL[name], raising=False)
    function = getattr(bench, test or f"test_{module}")
    if "compiled" in inspect.signature(function).parameters:
        arguments = arguments | {"compiled": not_compiled}
    function(contest, **arguments)
    ours = ("native", "segmenter_fast", "tiles in PyTorch")
    others = [name for name in contest.names if not name.startswith(ours)]
    yardsticks = contest.options.get("yardsticks", [])
    assert others == [*contest.peers, *yardsticks] and len(others) < len(contest.names)
    assert all("torch.compile" not in name for name in yardsticks)
    kernels = ("attention", "upsample_argmax", "upsample_cross_entropy", "windows")
    assert contest.options.get("gpu", False) == (module in kernels)
    if module == "attention":
        assert contest.options["work"].dtype == "bfloat16"


def test_whole_models_are_compiled_twice(modules, tiny, monkeypatch, tmp_path):
    bench, contest, asked = modules["bench_model"], Contest(), []
    monkeypatch.setattr(bench, "create_model", lambda *_, **__: tiny[0])
    monkeypatch.setattr(bench, "judges", lambda *_: (None, None))

    def compiled(function, *arguments, **options):
        asked.append(options)
        return lambda: None

    bench.whole_models(contest, compiled, tmp_path, "Seg-T-Mask/16", 1, 3)
    assert asked == [{}, {"mode": "max-autotune", "freezing": True}] * 2
    assert [n for n in contest.names if n not in contest.peers] == [
        f"segmenter_fast, {precision}" for precision in bench.PRECISIONS
    ]
    assert contest.options["gpu"] and contest.options["kind"]("Triton, GPU") == "GPU"
    assert {"OpenVINO alone, float32", "OpenVINO alone, bfloat16"} <= set(contest.peers)


@pytest.mark.parametrize("name", ["DeepLabv3+ ResNet-101, stride 16", "SETR-PUP ViT-B"])
def test_architectures_stand_beside_ours_in_pytorch(modules, monkeypatch, name):
    bench, contest = modules["bench_peers"], Contest()
    deeplab = modules["deeplab"].DeepLabV3Plus
    small = functools.partial(deeplab, depths=(1, 1, 1, 1), width=4, channels=8)
    monkeypatch.setattr(bench, "ARCHITECTURES", {name: small})
    bench.test_images_per_second(None, contest, lambda f, x: functools.partial(f, x), name)
    layouts = ["the same, channels last"] * name.startswith("DeepLab")
    assert contest.peers == [name, "the same, torch.compile", *layouts]
    beside = ["Seg-T-Mask/16, PyTorch", "Seg-T-Mask/16, segmenter_fast"]
    assert contest.names == contest.peers + beside
    assert contest.options["yardsticks"] == beside[:1] and contest.rounds >= 3
    for contestant in contest.peers:
        contest.check(contestant, contest.contestants[contestant]())
    plain, ours = (contest.contestants[name]() for name in beside)
    assert (plain == ours).double().mean() > 0.999


def test_published_figures_have_the_names_of_the_benchmark(modules):
    """`segmenter-fast tradeoff --peers` finds the accuracy of an architecture by its name."""
    from segmenter_fast.published import PUBLISHED
    from segmenter_fast.variants import VARIANTS

    others = {row.model for row in PUBLISHED} - set(VARIANTS)
    assert len(others) > 8 and others <= set(modules["bench_peers"].ARCHITECTURES)


@pytest.mark.parametrize("peer", ["SegFormer", "UPerNetSwin"])
def test_without_transformers(modules, monkeypatch, peer):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(modules["harness"].NotRun, match="needs transformers: pip install"):
        getattr(modules["hugging_face"], peer)(K)
