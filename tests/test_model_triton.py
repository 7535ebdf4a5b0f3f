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


def test_autocast_trains_in_bfloat16():
    model, image, target = tiny()
    exact = model(image, target).detach()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model.patch_logits(image)
        loss = model(image, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact, rtol=0.05, atol=0)
    loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


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


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a tensor that kernels cannot run on")
def test_no_silent_fallback(monkeypatch):
    model, image, target = tiny()
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    for call in (model, model.labels, lambda x: model(x, target)):
        with pytest.raises(BackendError, match="runs on a GPU; the input is on 'cpu'"):
            call(image)
