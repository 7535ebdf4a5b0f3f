"""The model with backend "triton": the official outputs, and how people train and deploy it."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_golden import GOLDEN, NAMES, assert_close
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, on_device

from segmenter_fast import SegmenterModel, predict
from segmenter_fast.backend import BackendError
from segmenter_fast.blocks import Block, DropPath
from segmenter_fast.ops import _triton

pytestmark = on_device

# The training size for the quickest model, sides that no patch divides for the others.
GOLDEN_CASES = {"seg_mask_16": 1, "seg_deit_mask_16": 1, "seg_linear_8": 0}


def golden(name):
    with np.load(GOLDEN / name / "io.npz") as stored:
        values = {key: torch.from_numpy(stored[key]) for key in stored}
    return SegmenterModel.from_pretrained(GOLDEN / name, backend="triton").to(DEVICE), values


def tiny():
    """(model, image, target) quick enough for the interpreter."""
    model, _ = golden("seg_linear_8")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 16, 16, generator=generator)
    target = torch.randint(0, model.n_cls, (1, 16, 16), generator=generator)
    target[0, :3] = 255
    return model, image.to(DEVICE), target.to(DEVICE)


def gradients(module):
    """Of the parameters in use; the classifier of the pretrained encoder, say, is not."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert any(name.startswith("encoder.patch_embed") for name in found)
    return found


def expected_gradients(model, image, target):
    model.zero_grad()
    model(image, target).backward()
    return gradients(model)


def assert_same_gradients(ours, expected):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------- golden
def test_there_is_a_case_for_every_golden_model():
    assert GOLDEN_CASES.keys() == set(NAMES)


@pytest.mark.parametrize(("name", "index"), GOLDEN_CASES.items())
def test_golden_logits_and_labels(name, index):
    model, values = golden(name)
    expected = values[f"logits{index}"]
    image = values[f"image{index}"].to(DEVICE)
    with torch.inference_mode():
        assert_close("logits", model(image).cpu(), expected)
        labels = model.labels(image).cpu().long()
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize(("name", "index"), GOLDEN_CASES.items())
def test_golden_loss_and_gradients(name, index):
    model, values = golden(name)
    loss = model(values[f"image{index}"].to(DEVICE), values[f"target{index}"].to(DEVICE))
    assert_close("loss", loss.detach().cpu(), values[f"loss{index}"])
    loss.backward()
    prefix = f"grad{index}/"
    names = [key.removeprefix(prefix) for key in values if key.startswith(prefix)]
    assert names
    parameters = dict(model.named_parameters())
    for parameter in names:
        assert_close(parameter, parameters[parameter].grad.cpu(), values[prefix + parameter])


def test_agrees_with_native():
    model, image, target = tiny()
    ours = expected_gradients(model, image, target)
    model = model.cpu()
    model.backend = "native"
    native = expected_gradients(model, image.cpu(), target.cpu())
    assert_same_gradients({name: x.cpu() for name, x in ours.items()}, native)


# ------------------------------------------------------------------------------------- training
def test_checkpointing_changes_nothing():
    model, image, target = tiny()
    expected = expected_gradients(model, image, target)
    model.zero_grad()
    checkpoint(model, image, target, use_reentrant=False).backward()
    assert_same_gradients(gradients(model), expected)


def test_distributed_data_parallel(tmp_path):
    model, image, target = tiny()
    expected = expected_gradients(model, image, target)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        wrapped.zero_grad()
        wrapped(image, target).backward()
        assert_same_gradients(gradients(wrapped.module), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype):
    model, image, target = tiny()
    exact = model(image, target).detach()
    with torch.autocast(DEVICE, dtype):
        logits = model.patch_logits(image)
        loss = model(image, target)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact, rtol=0.05, atol=0)
    loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


def test_loss_curve_of_twenty_steps():
    """Training with Triton is training with PyTorch; stochastic depth draws the same numbers."""
    curves = []
    for backend in ("triton", "reference"):
        model, image, target = tiny()
        # Two images of two patches each, one class on the left and another on the right.
        image, target = image[..., :8, :].repeat(2, 1, 1, 1), target[:, :8].repeat(2, 1, 1)
        target[:, 3:, :8], target[:, 3:, 8:] = 0, 1
        model.backend = backend
        model.train()
        for block in model.encoder.blocks:
            block.drop_path = DropPath(0.25)
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(20):
            loss = model(image, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.7 * curves[0][0], "it learns"
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_model_is_as_exact_as_pytorch(dtype):
    model, image, _ = tiny()
    with torch.inference_mode():
        exact = model.double().cpu()
        exact.backend = "reference"
        expected = exact.patch_logits(image.double().cpu()).logits()
        model, _, _ = tiny()
        model, image = model.to(dtype), image.to(dtype)
        errors = []
        for backend in ("triton", "reference"):
            model.backend = backend
            logits = model.patch_logits(image).logits().cpu()
            errors.append((logits - expected).abs().max().item())
    assert errors[0] <= 3 * errors[1] + 2 * torch.finfo(dtype).eps * expected.abs().max().item()


# ------------------------------------------------------------------------------------- blocks
OPERATORS = ("layer_norm_linear", "attention", "linear_residual", "mlp", "layer_norm")


def operators_of(block, x):
    """Names of our operators that a block calls."""
    with torch.profiler.profile() as profile:
        block(x)
    called = {event.key for event in profile.key_averages()}
    return {name for name in OPERATORS if f"segmenter_fast::{name}_triton" in called}


def make_block(**options):
    options = {"dropout": 0.0, "drop_path": 0.0, **options}
    block = Block(16, 2, 32, **options).to(DEVICE)
    block.attn.backend = "triton"
    return block, torch.randn(2, 5, 16, device=DEVICE)


def test_a_block_is_four_operators():
    for mode in (True, False):
        block, x = make_block(dropout=0.1 * (not mode), drop_path=0.1)
        block.train(mode)
        assert operators_of(block, x) == {
            "layer_norm_linear",
            "attention",
            "linear_residual",
            "mlp",
        }


class Adapter(torch.nn.Linear):
    """Stands for what adapters put in place of a layer."""


@pytest.mark.parametrize("change", ["dropout", "layer", "activation", "hook"])
def test_a_changed_block_runs_its_modules(change):
    """Whatever the fused operations would not do: dropout, other layers, hooks."""
    block, x = make_block(dropout=0.5 if change == "dropout" else 0.0)
    calls = []
    if change == "layer":
        block.mlp.fc2 = Adapter(32, 16).to(DEVICE)
    elif change == "activation":
        block.mlp.act = torch.nn.ReLU()
    elif change == "hook":
        block.attn.proj.register_forward_hook(lambda *_: calls.append(1))
    assert operators_of(block, x) == {"attention"}
    assert calls == [1] * (change == "hook")
    torch.manual_seed(0)
    y = block(x)
    if change != "dropout":
        block.attn.backend = "reference"
        torch.testing.assert_close(y, block(x))


def test_compile_fullgraph():
    model, image, target = tiny()
    expected = expected_gradients(model, image, target)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(image, target).backward()
    assert_same_gradients(gradients(model), expected)


# ------------------------------------------------------------------------------------- deployment
def test_export():
    class Labels(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model.labels(image)

    model, image, _ = tiny()
    with torch.inference_mode():
        expected = model.labels(image)
    program = torch.export.export(Labels(model), (image,))
    assert "segmenter_fast.upsample_argmax_triton" in program.graph_module.code
    assert torch.equal(program.module()(image), expected)


def test_predict_agrees_with_native():
    model, _, _ = tiny()
    image = np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    ours = predict(model, image)
    model = model.cpu()
    model.backend = "native"
    native = predict(model, image)
    assert ours.shape == native.shape == (20, 27)
    assert (ours.cpu() != native).float().mean() < 0.01


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are a GPU's")
def test_cuda_graphs_capture_a_training_step():
    """Nothing on the way asks the GPU for a number."""
    model, image, target = tiny()
    expected = expected_gradients(model, image, target)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected_gradients(model, image, target)
    stream.synchronize()
    model.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(image, target).backward()
    model.zero_grad(set_to_none=False)
    graph.replay()
    assert_same_gradients(gradients(model), expected)


def test_no_operation_asks_the_host_to_wait(monkeypatch):
    """With launches written down instead of run, whatever reads a tensor's numbers fails here."""
    model, image, target = tiny()
    image = image.cpu()
    model = model.cpu()
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):

        def refuse(*arguments, name=name, **options):
            raise AssertionError(f"Tensor.{name} waits for the GPU")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    with _triton.Recorder(90) as recorder:
        logits = model.patch_logits(image)
        logits.labels()
        logits.probabilities()
        logits.probabilities(top1=True)
        logits.confusion(target.to("cpu"))
        model(image, target.to("cpu"), label_smoothing=0.1).backward()
    launched = {launch.kernel.name for launch in recorder.launches}
    assert {"labels", "fill", "loss", "ratio", "corners", "gather"} <= launched
    assert {"attention", "attention_of_queries", "attention_of_keys", "layer_norm"} <= launched


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a tensor that kernels cannot run on")
def test_no_silent_fallback(monkeypatch):
    model, image, target = tiny()
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    for call in (model, model.labels, lambda x: model(x, target)):
        with pytest.raises(BackendError, match="runs on a GPU; the input is on 'cpu'"):
            call(image)
