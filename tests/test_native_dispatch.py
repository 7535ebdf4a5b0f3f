"""When the whole network is one compiled call, and when its layers are called one by one."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_native_network import HAS_BFLOAT16, HAS_INT8, images_of, make_model
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from segmenter_fast import BackendError, SegmenterModel, native
from segmenter_fast.blocks import Attention
from segmenter_fast.model import QUANTIZED

SIZE = (1, 32, 48)


class Watched:
    """Counts the calls of the compiled network."""

    def __init__(self, monkeypatch):
        self.calls = 0
        self.precisions = set()
        whole = native.NativeNetwork.__call__

        def counted(network, model, *arguments, **options):
            self.calls += 1
            self.precisions.add(model.precision)
            return whole(network, model, *arguments, **options)

        monkeypatch.setattr(native.NativeNetwork, "__call__", counted)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_inference_is_one_call(watched):
    model, images = make_model(), images_of(*SIZE)
    with torch.inference_mode():
        model.labels(images)
        model(images)
        model.patch_logits(images)
    with torch.no_grad():
        model.labels(images)
    assert watched.calls == 4


def test_prediction_is_one_call(watched):
    from segmenter_fast import predict

    model = make_model()
    predict(model, torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8).permute(1, 2, 0).numpy())
    assert watched.calls == 1


# What speaks against it: a change of the model or of the circumstances, and a part of the reason.
def _train(model):
    model.train()


def _one_layer_trains(model):
    model.encoder.blocks[0].mlp.drop.train()


def _float64(model):
    model.double()


def _half_the_parameters(model):
    model.decoder.bfloat16()


def _adapter(model):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1

    model.encoder.blocks[0].attn.qkv = Adapter(model.encoder.blocks[0].attn.qkv)


def _hook(model):
    model.encoder.blocks[1].register_forward_hook(lambda *_: None)


def _hook_before(model):
    model.decoder.register_forward_pre_hook(lambda *_: None)


def _own_forward(model):
    block = model.encoder.blocks[0]
    block.forward = block.forward


def _parametrization(model):
    nn.utils.parametrizations.weight_norm(model.encoder.blocks[0].mlp.fc1)


def _tanh_gelu(model):
    model.encoder.blocks[0].mlp.act = nn.GELU("tanh").eval()


def _no_bias(model):
    model.encoder.blocks[0].attn.qkv.bias = None


def _various_eps(model):
    model.encoder.blocks[0].norm2.eps = 1e-3


def _other_encoder(model):
    class Encoder(type(model.encoder)):
        pass

    model.encoder.__class__ = Encoder


def _other_heads(model):
    model.encoder.blocks[0].attn.heads = 1


def _narrower_mlp(model):
    mlp = model.encoder.blocks[1].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(64, 128).eval(), nn.Linear(128, 64).eval()


def _no_block(model):
    model.encoder.blocks[1] = nn.Identity().eval()


def _no_blocks(model):
    model.decoder.blocks = nn.ModuleList().eval()


def _no_norm(model):
    model.encoder.norm = nn.Identity().eval()


def _bare_norm(model):
    model.encoder.norm = nn.LayerNorm(64, elementwise_affine=False).eval()


def _no_act(model):
    model.encoder.blocks[0].mlp.act = nn.Identity().eval()


def _a_layer_for_dropout(model):
    model.encoder.dropout = nn.LayerNorm(64).eval()


def _a_layer_after_the_projection(model):
    model.decoder.blocks[0].attn.proj_drop = nn.Linear(64, 64).eval()


def _no_bias_before_the_decoder(model):
    model.decoder.proj_dec = nn.Linear(64, 64, bias=False).eval()


def _wider_classes(model):
    model.decoder.cls_emb = nn.Parameter(torch.randn(1, 7, 64))


def _padded_patches(model):
    model.encoder.patch_embed.proj.padding = (1, 1)


def _a_slot_is_gone(model):
    del model.encoder.blocks[0].attn._modules["attn_drop"]


CHANGES = {
    _train: "training mode",
    _one_layer_trains: "training mode",
    _half_the_parameters: "parameters are torch.bfloat16",
    _adapter: "encoder.blocks.0.attn.qkv is a Adapter, not a Linear",
    _hook: "encoder.blocks.1 has hooks",
    _hook_before: "decoder has hooks",
    _own_forward: "encoder.blocks.0 has methods of its own",
    _parametrization: "fc1 is a ParametrizedLinear|hooks",
    _tanh_gelu: "encoder.blocks.0.mlp.act approximates GELU",
    _no_bias: "encoder.blocks.0.attn.qkv has no bias",
    _various_eps: "encoder.blocks have various heads, hidden widths or eps",
    _other_encoder: "encoder is a Encoder, not a VisionTransformer",
    _other_heads: "encoder.blocks have various heads",
    _narrower_mlp: "encoder.blocks have various heads, hidden widths",
    _no_block: "encoder.blocks.1 is a Identity, not a Block",
    _no_blocks: "decoder.blocks are none",
    _no_norm: "encoder.norm is a Identity, not a LayerNorm",
    _bare_norm: "encoder.norm has no weight",
    _no_act: "encoder.blocks.0.mlp.act is a Identity, not a GELU",
    _a_layer_for_dropout: "encoder.dropout is a LayerNorm, not a Dropout",
    _a_layer_after_the_projection: "decoder.blocks.0.attn.proj_drop is a Linear",
    _no_bias_before_the_decoder: "decoder.proj_dec has no bias",
    _wider_classes: r"decoder has a cls_emb of \(1, 7, 64\), not \(1, 5, 64\)",
    _padded_patches: "encoder.patch_embed.proj is padded, dilated or grouped",
    _a_slot_is_gone: "a module lacks 'attn_drop'",
}
# Of these the layers themselves make nothing, or every time something else.
NOT_COMPARED = {
    _half_the_parameters,
    _wider_classes,
    _padded_patches,
    _a_slot_is_gone,
    _train,
    _one_layer_trains,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
@torch.inference_mode()
def test_layers_where_the_model_is_not_plain(change, watched):
    with torch.inference_mode(False):
        model = make_model()
        change(model)
    images = images_of(*SIZE)
    assert re.search(CHANGES[change], native.why_not(model, images))
    if change not in NOT_COMPARED:
        expected = copy.deepcopy(model)
        expected.backend = "reference"
        torch.testing.assert_close(
            model.patch_logits(images).grid, expected.patch_logits(images).grid,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert watched.calls == 0
    model.precision = "int8"
    with pytest.raises(BackendError, match="precision 'int8'"):
        model.patch_logits(images)


@torch.inference_mode()
def test_layers_where_a_class_has_other_methods(watched, monkeypatch):
    """Of the model, whose features are asked for, and of a layer that somebody patched."""

    class Other(SegmenterModel):
        def _features(self, images):
            return super()._features(images) * 2

    model, images = make_model(), images_of(*SIZE)
    other = Other(model.encoder, model.decoder, model.n_cls).eval()
    assert "Other has features of its own" in native.why_not(other, images)
    other.patch_logits(images)
    whole = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x: 2 * whole(self, x))
    assert "Attention.forward is not the original" in native.why_not(model, images)
    model.patch_logits(images)
    assert watched.calls == 0


def test_a_head_for_other_classes(watched):
    """As often exchanged for fine-tuning, and `n_cls` left as it was."""
    model, images = make_model("linear", n_cls=150), images_of(*SIZE)
    model.decoder.head = nn.Linear(64, 21).eval()
    with torch.inference_mode():
        assert "decoder.head has a weight of (21, 64), not (150, 64)" in native.why_not(
            model, images
        )
        assert model.patch_logits(images).grid.shape[1] == 21
        # The decoder counts, whatever the model says of itself.
        model = make_model()
        model.n_cls = 1
        assert model.patch_logits(images).grid.shape[1] == 5
    assert watched.calls == 1


def test_shared_layers_are_one_call(watched):
    model, images = make_model(), images_of(*SIZE)
    model.encoder.blocks[1] = model.encoder.blocks[0]
    model.decoder.blocks[1].mlp.fc1.weight = model.decoder.blocks[0].mlp.fc1.weight
    expected = copy.deepcopy(model)
    expected.backend = "reference"
    with torch.inference_mode():
        torch.testing.assert_close(
            model.patch_logits(images).grid, expected.patch_logits(images).grid,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert watched.calls == 1


def test_layers_under_transforms(watched):
    model, images = make_model(), images_of(3, *SIZE[1:])
    expected = copy.deepcopy(model)
    expected.backend = "reference"

    def one(of, image):
        return of.patch_logits(image[None]).grid[0]

    with torch.no_grad():
        results = [
            torch.func.vmap(lambda image, of=of: one(of, image))(images) for of in (model, expected)
        ]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(images, torch.ones_like(images))
            logits = model.patch_logits(dual).grid
            assert forward_ad.unpack_dual(logits).tangent is not None
    assert watched.calls == 0


def test_a_default_device_and_dtype_change_nothing(watched):
    model, images = make_model(), images_of(*SIZE)
    with torch.inference_mode():
        expected = model.patch_logits(images).grid
        with torch.device("cpu"):
            assert torch.equal(model.patch_logits(images).grid, expected)
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                logits = model.patch_logits(images).grid
            finally:
                torch.set_default_dtype(torch.float32)
            assert torch.equal(logits, expected) and logits.dtype == torch.float32
    assert watched.calls == 4


def test_layers_where_the_dtype_is_another(watched):
    model = make_model().double()
    with torch.inference_mode():
        assert model.patch_logits(images_of(*SIZE).double()).dtype == torch.float64
    assert watched.calls == 0


def test_layers_where_something_watches_operations(watched):
    model, images = make_model(), images_of(*SIZE)
    with torch.inference_mode(), Nothing():
        model.labels(images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.labels(images)
    assert watched.calls == 0


def test_layers_where_gradients_are_recorded(watched):
    model, images = make_model(), images_of(*SIZE)
    model(images).sum().backward()
    assert model.encoder.pos_embed.grad is not None and watched.calls == 0
    # Inference in bfloat16 leaves training alone.
    model.precision = "bfloat16"
    assert model.patch_logits(images).dtype == torch.float32
    assert watched.calls == 0


@pytest.mark.parametrize("backend", ["reference"])
def test_layers_by_another_backend(backend, watched):
    model = make_model()
    model.backend = backend
    with torch.inference_mode():
        model.labels(images_of(*SIZE))
    assert watched.calls == 0


def test_layers_in_compiled_code(watched):
    model, images = make_model(), images_of(*SIZE)
    compiled = torch.compile(model.patch_logits, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        expected = model.patch_logits(images).grid
        assert watched.calls == 1
        torch.testing.assert_close(compiled(images).grid, expected, rtol=1e-4, atol=1e-4)
    assert watched.calls == 1


def test_bfloat16_without_an_instruction_is_autocast(watched, monkeypatch):
    model, images = make_model(), images_of(*SIZE)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model.patch_logits(images).grid
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", "generic")
    model.precision = "bfloat16"
    with torch.inference_mode():
        torch.testing.assert_close(model.patch_logits(images).grid, expected, rtol=0.05, atol=0.05)
        assert watched.calls == 0
        # Nor does a compiler's code without AVX2 replace PyTorch's products.
        model.precision = "float32"
        model.patch_logits(images)
    assert watched.calls == 0


@pytest.mark.skipif(not HAS_BFLOAT16, reason="no AVX512_BF16")
def test_amx_is_left_to_pytorch(watched, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    model = make_model()
    model.precision = "bfloat16"
    with torch.inference_mode():
        model.labels(images_of(*SIZE))
    assert watched.calls == 0


# --------------------------------------------------------------------------- precision
def test_precision_is_checked():
    model = make_model()
    assert model.precision == "float32" and model.quantized == QUANTIZED
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, int8; got"):
        model.precision = "float16"
    with pytest.raises(ValueError, match="quantized must be among fc1, fc2, proj, qkv; got"):
        model.quantized = {"head"}
    with pytest.raises(ValueError, match="precision must be one of"):
        SegmenterModel(model.encoder, model.decoder, 5, precision="half")
    assert SegmenterModel(model.encoder, model.decoder, 5, precision="int8").precision == "int8"


def test_precision_goes_with_copies_and_pretrained(tmp_path):
    model = make_model()
    model.precision = "bfloat16"
    assert copy.deepcopy(model).precision == "bfloat16"
    model.save_pretrained(tmp_path)
    assert SegmenterModel.from_pretrained(tmp_path).precision == "float32"
    assert SegmenterModel.from_pretrained(tmp_path, precision="int8").precision == "int8"


def test_int8_says_what_it_needs(monkeypatch):
    model, images = make_model(), images_of(*SIZE)
    model.precision = "int8"
    # Training goes on as ever.
    model.train()(images).sum().backward()
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(BackendError, match="autocast is on"):
            model.labels(images)
    model.backend = "reference"
    with torch.inference_mode(), pytest.raises(BackendError, match="backend is 'reference'"):
        model.labels(images)
    model.backend = "auto"
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", "generic")
    with torch.inference_mode(), pytest.raises(BackendError, match="AVX-512 VNNI"):
        model.labels(images)


@pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
@torch.inference_mode()
def test_every_kind_of_layer_counts():
    model, images = make_model(), images_of(*SIZE)
    exact = model.patch_logits(images).grid
    model.precision = "int8"
    errors = {}
    for kinds in ((), *((kind,) for kind in sorted(QUANTIZED)), QUANTIZED):
        model.quantized = kinds
        errors[tuple(sorted(kinds))] = (model.patch_logits(images).grid - exact).norm().item()
    assert len(set(errors.values())) == len(errors)
    assert errors[tuple(sorted(QUANTIZED))] == max(errors.values())


@pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
def test_commands_take_a_precision(tmp_path, watched):
    from typer.testing import CliRunner

    from segmenter_fast.cli import app

    model = make_model(image_size=(32, 32))
    model.save_pretrained(tmp_path / "weights")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "image.png")
    command = ["predict", str(tmp_path / "image.png"), "-w", str(tmp_path / "weights")]
    command += ["-o", str(tmp_path / "out"), "--device", "cpu", "--precision"]
    assert CliRunner().invoke(app, [*command, "int8"]).exit_code == 0
    assert watched.precisions == {"int8"}
    result = CliRunner().invoke(app, [*command, "float16"])
    assert result.exit_code == 2 and "float16" in result.output
