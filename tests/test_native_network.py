"""The one compiled call for the whole network: its numbers, and the weights that it keeps."""

import copy
import multiprocessing
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import _C, BackendError, SegmenterModel, native, reference
from segmenter_fast.backend import PRECISIONS
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.model import QUANTIZED
from segmenter_fast.native_model import MOST_INT8_INPUTS, describe
from segmenter_fast.variants import create_model_from_config

SIMD_LEVELS = _C.build_info()["simd_levels"]
HAS_BFLOAT16 = _C.simd_level() == "avx512_bf16"
HAS_INT8 = _C.simd_level() in ("avx512_vnni", "avx512_bf16")
HERE = [
    pytest.param("float32", marks=pytest.mark.skipif(_C.simd_level() == "generic", reason="slow")),
    pytest.param("bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no AVX512_BF16")),
    pytest.param("int8", marks=pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")),
]


def make_model(
    decoder: str = "mask_transformer",
    patch: int = 8,
    width: int = 64,
    heads: int = 2,
    n_cls: int = 5,
    distilled: bool = False,
    depth: int = 2,
    image_size: tuple[int, int] = (32, 64),
    seed: int = 0,
) -> SegmenterModel:
    """A small model whose every parameter matters: no zero biases, no norms of ones."""
    torch.manual_seed(seed)
    config = SegmenterConfig(
        n_cls=n_cls,
        image_size=image_size,
        patch_size=patch,
        d_model=width,
        n_layers=depth,
        n_heads=heads,
        distilled=distilled,
        decoder=decoder,
        decoder_n_layers=2 if decoder == "mask_transformer" else 0,
    )
    model = create_model_from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def images_of(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_by(model: SegmenterModel, images: Tensor, precision: str = "float32") -> Tensor:
    """Patch logits of the compiled call, which must take it."""
    model.precision = precision
    assert native.why_not(model, images) is None
    logits = native.inference_logits(model, images)
    assert logits is not None
    again = model.patch_logits(images).grid
    assert torch.equal(torch.nan_to_num(logits), torch.nan_to_num(again))
    return logits


@torch.inference_mode()
def by_layers(model: SegmenterModel, images: Tensor, dtype=torch.float32, autocast=False) -> Tensor:
    model = copy.deepcopy(model).to(dtype)
    model.backend, model.precision = "reference", "float32"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model.patch_logits(images.to(dtype)).grid


def assert_as_accurate(model: SegmenterModel, images: Tensor, precision: str, k: float = 3) -> None:
    logits = logits_by(model, images, precision)
    exact = by_layers(model, images, torch.float64)
    if precision == "float32":
        assert_close("logits", logits, by_layers(model, images), exact, k)
    elif precision == "bfloat16":
        # Held to the layers' error under autocast, but stored in float32.
        theirs = by_layers(model, images, autocast=True).float()
        assert_close("logits", logits, theirs, exact, k=2)
    else:
        # 8 bits of weights and activations: errors of a few per cent of the spread of logits.
        error = (logits - exact).norm() / (exact - exact.mean()).norm()
        assert error < 0.15, f"relative error {error:.3f}"


# --------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize(
    ("patch", "width", "heads", "distilled", "n_cls"),
    [(8, 64, 2, False, 5), (16, 192, 3, True, 150), (32, 128, 1, False, 65), (8, 96, 3, True, 1)],
)
def test_as_accurate_as_the_layers(precision, decoder, patch, width, heads, distilled, n_cls):
    model = make_model(decoder, patch, width, heads, n_cls, distilled, image_size=(64, 96))
    for images in (images_of(1, 64, 96), images_of(3, 70, 45)):
        if n_cls == 1 and decoder == "mask_transformer":
            # The norm over one class leaves its bias alone, exactly.
            bias = model.decoder.mask_norm.bias.item()
            logits = logits_by(model, images, precision)
            assert torch.equal(logits, torch.full_like(logits, bias))
        else:
            assert_as_accurate(model, images, precision)


@pytest.mark.parametrize("variant", ["Seg-T-Mask/16", "Seg-S/32", "Seg-B-Mask/16", "DeiT-Mask/16"])
@pytest.mark.parametrize("precision", HERE)
def test_published_variants(variant, precision):
    from segmenter_fast import create_model, list_variants

    name = next(n for n in list_variants() if variant in n)
    torch.manual_seed(0)
    model = create_model(name, num_classes=150, image_size=128).eval()
    assert_as_accurate(model, images_of(1, 128, 96), precision)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_simd_level(level, precision, monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    try:
        _C.simd_level()
    except RuntimeError as error:
        pytest.skip(str(error))
    model = make_model(n_cls=70)
    images = images_of(2, 40, 56)
    model.precision = precision
    with torch.inference_mode():
        if precision == "int8" and level not in ("avx512_vnni", "avx512_bf16"):
            with pytest.raises(BackendError, match=f"AVX-512 VNNI; .* the level '{level}'"):
                native.network_of(model)
            return
        # Also where model.patch_logits would call the layers, since they are quicker there.
        logits, _ = native.network_of(model)(model, images)
    exact = by_layers(model, images, torch.float64)
    if precision == "float32":
        assert_close("logits", logits, by_layers(model, images), exact)
    else:
        assert (logits - exact).norm() / (exact - exact.mean()).norm() < 0.15


class Quantized(torch.nn.Linear):
    """What int8 stands for: bytes for each token's inputs, and for each output's weights."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        weight = torch.round(self.weight / scale) * scale
        low = x.amin(-1, keepdim=True)
        step = (x.amax(-1, keepdim=True) - low) / 255
        return torch.nn.functional.linear(
            torch.floor((x - low) / step + 0.5) * step + low, weight, self.bias
        )


@pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
@pytest.mark.parametrize("kinds", [*sorted(QUANTIZED), None])
def test_int8_is_the_quantisation_that_it_says(kinds, monkeypatch):
    """Each kind of layer by itself and all of them, with float32 for the rest."""
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", "avx512_vnni")
    kinds = QUANTIZED if kinds is None else {kinds}
    # One block: what is rounded the other way is not rounded again and again.
    model, images = make_model("linear", n_cls=70, width=128, depth=1), images_of(2, 40, 56)
    with torch.no_grad():  # outputs and inputs of various sizes
        for name, parameter in model.named_parameters():
            if ".blocks." in name and parameter.ndim == 2:
                parameter.mul_(torch.linspace(0.5, 2, len(parameter))[:, None])
    quantized = copy.deepcopy(model)
    [block] = quantized.encoder.blocks
    for kind in kinds:
        owner = block.attn if kind in ("qkv", "proj") else block.mlp
        getattr(owner, kind).__class__ = Quantized
    model.quantized = kinds
    logits = logits_by(model, images, "int8")
    exact = by_layers(model, images, torch.float64)
    expected = by_layers(quantized, images, torch.float64)
    # A sum that is rounded the other way is one step of a byte, here and there.
    assert (logits - expected).norm() < 0.2 * (expected - exact).norm()


def test_the_specification():
    """Held to the mathematics that shares no code with the modules, too."""
    model, images = make_model(n_cls=7), images_of(2, 37, 61)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    exact = reference.patch_logits(images.double(), state, model.config)
    assert (logits_by(model, images) - exact).abs().max() < 1e-4


@pytest.mark.parametrize("precision", HERE)
def test_threads_do_not_change_a_bit(precision):
    model, images = make_model(n_cls=70), images_of(2, 120, 88)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [logits_by(model, images, precision) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("precision", HERE)
def test_an_image_does_not_depend_on_its_batch(precision):
    model, images = make_model(), images_of(5, 40, 56)
    together = logits_by(model, images, precision)
    for i in range(5):
        assert torch.equal(logits_by(model, images[i : i + 1], precision)[0], together[i])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 200), (200, 3), (64, 16)])
def test_any_size(size):
    # Of a few numbers alone, PyTorch's may happen to be nearly exact.
    assert_as_accurate(make_model(), images_of(1, *size), "float32", k=12)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_model(data):
    check_drawn_case(data)


@pytest.mark.nightly
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_model_at_length(data):
    check_drawn_case(data)


def check_drawn_case(data: st.DataObject) -> None:
    def draw(low, high):
        return data.draw(st.integers(low, high))

    head_width = data.draw(st.sampled_from((32, 64, 128)))
    heads = draw(1, 3)
    patch = data.draw(st.sampled_from((4, 8, 16, 32)))
    model = make_model(
        data.draw(st.sampled_from(("linear", "mask_transformer"))),
        patch,
        head_width * heads,
        heads,
        draw(2, 140),
        data.draw(st.booleans()),
        draw(1, 3),
        (draw(1, 5) * patch, draw(1, 5) * patch),
        draw(0, 1000),
    )
    images = images_of(draw(1, 3), draw(1, 7 * patch), draw(1, 7 * patch), draw(0, 1000))
    for precision in PRECISIONS:
        if (precision == "bfloat16" and not HAS_BFLOAT16) or (precision == "int8" and not HAS_INT8):
            continue
        if precision == "float32":
            assert_as_accurate(model, images, precision, k=12)
        else:
            assert torch.isfinite(logits_by(model, images, precision)).all()


@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(precision, value):
    """One bad pixel reaches every token by attention, here as in the layers."""
    model = make_model()
    images = images_of(2, 32, 32)
    images[1, 0, 3, 5] = value
    logits = logits_by(model, images, precision)
    assert by_layers(model, images)[1].isnan().all()
    assert logits[1].isnan().all()
    assert torch.isfinite(logits[0]).all()


@pytest.mark.parametrize("precision", HERE)
def test_bad_weights_show(precision):
    model = make_model()
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc1.weight[3, 2] = float("nan")
    assert logits_by(model, images_of(1, 32, 32), precision).isnan().all()


@pytest.mark.parametrize("precision", HERE)
def test_overflow_shows(precision):
    """Squares that overflow in a layer norm would pass for a large variance."""
    model = make_model()
    assert logits_by(model, torch.full((1, 3, 32, 32), 1e20), precision).isnan().all()


@pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
def test_int8_counts_in_32_bits():
    model = make_model("linear", width=32, heads=1, depth=1)
    hidden = MOST_INT8_INPUTS + 32
    for block in model.encoder.blocks:
        block.mlp.fc1 = torch.nn.Linear(32, hidden).eval()
        block.mlp.fc2 = torch.nn.Linear(hidden, 32).eval()
    assert_as_accurate(model, images_of(1, 16, 16), "bfloat16" if HAS_BFLOAT16 else "float32")
    with pytest.raises(BackendError, match="at most; one has 65568"):
        logits_by(model, images_of(1, 16, 16), "int8")


def test_writes_only_its_logits():
    model, images = make_model(n_cls=3), images_of(1, 40, 40)
    with torch.inference_mode():
        network = native.network_of(model)
        expected, _ = network(model, images)
    guard = 64
    memory = torch.full((guard + 25 * 3 + guard,), 123.0)
    positions = network._positions_of(model.encoder, (5, 5))
    network._network.run(
        images.data_ptr(),
        (1, 40, 40),
        positions.data_ptr(),
        memory[guard:].data_ptr(),
        3,
    )
    assert (memory[:guard] == 123).all() and (memory[-guard:] == 123).all()
    assert torch.equal(memory[guard:-guard].view(25, 3), expected[0].flatten(1).T)


def test_large_images_take_memory_in_proportion():
    """65,537 tokens: a square of them would be 17 GB."""
    model = make_model("linear", width=32, heads=1, n_cls=2, depth=1)
    with torch.inference_mode():
        labels = model.labels(images_of(1, 2048, 2048))
    assert labels.shape == (1, 2048, 2048)


# --------------------------------------------------------------------------- what is kept
def changed_by(model: SegmenterModel, change) -> bool:
    images = images_of(1, 32, 32)
    before = logits_by(model, images)
    change()
    after = logits_by(model, images)
    assert_close("after", after, by_layers(model, images), by_layers(model, images, torch.float64))
    return not torch.equal(before, after)


def test_sees_every_change_of_parameters():
    model = make_model()
    weight = model.encoder.blocks[0].attn.qkv.weight
    other = make_model(seed=1).state_dict()

    def step():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images_of(1, 32, 32)).sum().backward()
        optimizer.step()

    def exchange():
        model.decoder.proj_patch = torch.nn.Parameter(model.decoder.proj_patch * 2 + 1)

    def in_place():
        with torch.no_grad():
            weight[5, 5] += 1

    def average():
        # As exponential moving averages are often written: PyTorch does not count it.
        weight.data.mul_(0.5)

    for change in (step, exchange, in_place, average, lambda: model.load_state_dict(other)):
        assert changed_by(model, change), change


def test_sees_changes_of_what_was_made_in_inference_mode():
    with torch.inference_mode():
        model = copy.deepcopy(make_model())
        assert all(parameter.is_inference() for parameter in model.parameters())

        def in_place():
            model.encoder.blocks[1].mlp.fc2.weight[7, 11] += 1

        assert changed_by(model, in_place)


def test_models_made_in_inference_mode_can_be_trained(tmp_path):
    """And their changes are counted, so that no call has to look at all of their parameters."""
    with torch.inference_mode():
        made = make_model()
        made.save_pretrained(tmp_path)
        loaded = SegmenterModel.from_pretrained(tmp_path)
    for model in (made, loaded):
        assert not any(parameter.is_inference() for parameter in model.parameters())
        model(images_of(1, 32, 32)).sum().backward()
        assert model.encoder.pos_embed.grad is not None


def test_sees_changes_that_move_no_byte():
    """Of sizes and attributes that were packed, and of a parameter's order in memory."""
    model = make_model(width=128, heads=2)

    def eps():
        model.encoder.norm.eps = model.decoder.decoder_norm.eps = 1.0

    def heads():
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.attn.heads = 4

    def transpose():
        model.decoder.proj_patch.data = model.decoder.proj_patch.data.t()

    for change in (eps, heads, transpose):
        assert changed_by(model, change), change


def test_parameters_in_any_memory():
    model = make_model()
    fc1, qkv = model.encoder.blocks[0].mlp.fc1, model.encoder.blocks[1].attn.qkv
    fc1.weight = torch.nn.Parameter(torch.randn(1).expand(256, 64))  # of one number
    qkv.weight = torch.nn.Parameter(torch.randn(64, 192).t())
    model.to(memory_format=torch.channels_last)
    assert_as_accurate(model, images_of(1, 32, 32), "float32")
    images = torch._neg_view(images_of(1, 32, 32))
    assert torch.equal(logits_by(model, images), logits_by(model, images.clone()))


def test_forget():
    model, images = make_model(), images_of(1, 32, 32)
    before = logits_by(model, images)
    weight = model.encoder.blocks[0].attn.qkv.weight
    # A few numbers in the middle, through `.data`: not to be noticed in general.
    weight.data.view(-1)[5000:5010] += 1
    native.forget(model)
    assert model not in native._networks
    after = logits_by(model, images)
    assert not torch.equal(before, after)
    assert_as_accurate(model, images, "float32")
    native.forget(make_model())  # nothing to forget


def test_packs_once(monkeypatch):
    made = []
    whole = native.NativeNetwork.__init__

    def counted(self, *arguments):
        made.append(arguments[1:])
        whole(self, *arguments)

    monkeypatch.setattr(native.NativeNetwork, "__init__", counted)
    model = make_model()
    for size in (32, 40, 32, 48):
        logits_by(model, images_of(2, size, size))
    assert made == [("float32", QUANTIZED)]
    if HAS_INT8:
        model.quantized = {"qkv"}
        logits_by(model, images_of(2, 32, 32), "int8")
        assert made[1:] == [("int8", frozenset({"qkv"}))]
    logits_by(model, images_of(1, 32, 32), "float32")
    assert len(native._networks) >= 1


def test_goes_with_its_model():
    model = make_model()
    logits_by(model, images_of(1, 32, 32))
    count = len(native._networks)
    del model
    import gc

    gc.collect()
    assert len(native._networks) < count


def test_copies_and_files_do_without_it(tmp_path):
    model = make_model()
    images = images_of(1, 32, 32)
    expected = logits_by(model, images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_by(twin, images), expected)
        with torch.no_grad():
            twin.decoder.cls_emb.add_(1)
        assert not torch.equal(logits_by(twin, images), expected)
        assert torch.equal(logits_by(model, images), expected)
    model.save_pretrained(tmp_path)
    loaded = SegmenterModel.from_pretrained(tmp_path, precision="float32")
    assert torch.equal(logits_by(loaded, images), expected)


def test_memory_of_packed_weights():
    model = make_model(width=192, heads=3, depth=4)
    size = sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        assert 0.7 * size < native.network_of(model).bytes < 1.2 * size
        for precision, share in (("bfloat16", 0.5), ("int8", 0.3)):
            if precision == "int8" and not HAS_INT8:
                continue
            model.precision = precision
            # Class, position and classification parameters are not packed.
            assert native.network_of(model).bytes < 1.3 * share * size


def test_calls_from_several_threads():
    model = make_model()
    batches = [images_of(1, 24 + 8 * i, 64, seed=i) for i in range(6)]
    expected = [logits_by(model, images) for images in batches]
    with ThreadPoolExecutor(6) as executor:
        for _ in range(5):
            for result, right in zip(
                executor.map(lambda x: logits_by(model, x), batches), expected, strict=True
            ):
                assert torch.equal(result, right)


class Exchanging:
    """The compiled module; just before it reads a model's memory, the model gets other memory.

    As if by another thread, while the interpreter's lock is free.
    """

    def __init__(self, model):
        self.model, self.freed, self.read = model, set(), 0
        self.exchange()

    def __getattr__(self, name):
        return getattr(_C, name)

    def exchange(self):
        parameters = list(self.model.parameters())
        arrays = [parameter.detach().numpy().copy() for parameter in parameters]
        for parameter, array in zip(parameters, arrays, strict=True):
            self.freed.discard(array.ctypes.data)
            weakref.finalize(array, self.freed.add, array.ctypes.data)
            parameter.data = torch.from_numpy(array)

    def sample(self, pointers, *args):
        self.exchange()
        assert not self.freed & set(pointers)
        self.read += len(pointers)
        return _C.sample(pointers, *args)

    def Network(self, shape, parameters, *args):
        self.exchange()
        assert not self.freed & {pointer for pointer, _ in parameters.values()}
        self.read += len(parameters)
        return _C.Network(shape, parameters, *args)


def test_parameters_exchanged_by_another_thread(monkeypatch):
    """`.data =`, as in `model.to(...)`, frees what was looked at, unless it is held."""
    model = make_model(width=192, heads=3)
    images = images_of(1, 32, 32)
    expected = logits_by(model, images)
    module = Exchanging(model)
    monkeypatch.setattr(native, "native_module", lambda: module)
    for _ in range(3):
        assert torch.equal(logits_by(model, images), expected)
    # Each call compares, notes what it packs, and packs.
    assert module.read >= 3 * (2 * len(list(model.parameters())) + 30) and module.freed


def test_kept_memory_is_bounded():
    """Whatever the number of calls at once, and of sizes."""
    model = make_model("linear", width=32, heads=1, n_cls=2, depth=1)
    large = images_of(1, 768, 768)
    with torch.inference_mode():
        network = native.network_of(model)
        with ThreadPoolExecutor(6) as executor:
            list(executor.map(lambda _: network(model, large), range(12)))
        for size in range(200, 1200, 100):
            network(model, images_of(1, size, size))
        one = images_of(1, 8, 8)
        network(model, one)
    assert 0 < network._network.kept <= 256 << 20
    assert sum(p.nbytes for p in network._positions.values()) <= native._KEPT_POSITIONS
    assert 1 < len(network._positions)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_child():
    model, images = make_model(), images_of(1, 40, 40)
    expected = logits_by(model, images)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if torch.equal(logits_by(model, images), expected) else 1)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_while_another_thread_packs():
    """The child has the lock as the thread left it that it does not have."""
    model, images = make_model(), images_of(1, 40, 40)
    expected = logits_by(model, images)
    context = multiprocessing.get_context("fork")

    def child():
        os._exit(0 if torch.equal(logits_by(model, images), expected) else 1)

    with native._lock:
        process = context.Process(target=child)
        process.start()
    process.join(60)
    assert process.exitcode == 0


def test_seconds_of():
    model = make_model(n_cls=20)
    seconds = native.seconds_of(model, images_of(1, 64, 64))
    assert list(seconds) == ["embed", "attention", "linear", "norm", "head"]
    assert all(0 < value < 10 for value in seconds.values())
    model.train()
    with pytest.raises(BackendError, match="training mode"):
        native.seconds_of(model, images_of(1, 64, 64))


# --------------------------------------------------------------------------- the binding
def shape_and_addresses(model):
    shape, parameters, _ = describe(model)
    return shape, {name: (t.data_ptr(), t.numel()) for name, t in parameters.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "shape lacks width"),
        ({"width": 0}, "sizes must be positive"),
        ({"heads": 3}, "width: expected heads of 32, 64 or 128 channels"),
        ({"decoder_heads": 64}, "decoder_width: expected heads of 32"),
        ({"patch": 3}, "patch_embed.proj.weight: expected 1728 numbers, got 12288"),
        ({"depth": 3}, "no parameter encoder.blocks.2.norm1.weight"),
        ({"hidden": 128}, "encoder.blocks.0.mlp.fc1.weight: expected 8192 numbers, got 16384"),
        ({"hidden": 100}, "hidden: expected a multiple of 32"),
        ({"classes": 4}, "decoder.cls_emb: expected 256 numbers, got 320"),
        ({"extra_tokens": -5}, "sizes must not be negative"),
    ],
)
def test_binding_rejects_bad_shapes(change, message):
    model = make_model()
    shape, addresses = shape_and_addresses(model)
    shape = {k: v for k, v in (shape | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        _C.Network(shape, addresses, "float32", set(), 1)


def test_binding_rejects_other_input():
    model = make_model()
    shape, addresses = shape_and_addresses(model)
    address, _ = addresses["encoder.patch_embed.proj.weight"]
    odd = addresses | {"encoder.patch_embed.proj.weight": (address, 3 * 3 * 3 * 64)}
    with pytest.raises(ValueError, match="a multiple of 4 inputs"):
        _C.Network(shape | {"patch": 3}, odd, "float32", set(), 1)
    with pytest.raises(ValueError, match="quantized: expected qkv, proj, fc1 or fc2, got head"):
        _C.Network(shape, addresses, "float32", {"head"}, 1)
    with pytest.raises(ValueError, match="dtype"):
        _C.Network(shape, addresses, "float16", set(), 1)
    network = _C.Network(shape, addresses, "float32", set(), 1)
    with pytest.raises(ValueError, match="no pixels"):
        network.run(0, (1, 0, 3), 0, 0, 1)
    assert network.run(0, (0, 8, 8), 0, 0, 1) == {}
    with pytest.raises(ValueError, match="as many sizes as pointers"):
        _C.sample([1], [], 64)


def test_sample_looks_at_the_ends():
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    before = _C.sample([memory.data_ptr()], [memory.nbytes], 256)
    for where in (0, -1):
        memory[where] = 1
        assert _C.sample([memory.data_ptr()], [memory.nbytes], 256) != before
        memory[where] = 0
    memory[12345] = 1
    assert _C.sample([memory.data_ptr()], [memory.nbytes], 1 << 30) != before


def test_peak():
    for kind in PRECISIONS:
        rate = _C.peak(kind, 1, 0.01)
        has = {"float32": True, "bfloat16": HAS_BFLOAT16, "int8": HAS_INT8}[kind]
        assert (rate > 1e9) == has
    with pytest.raises(ValueError, match="float32, bfloat16 or int8"):
        _C.peak("float8", 1, 0.01)
