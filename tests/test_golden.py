"""The official implementation's outputs, gradients and attention maps, reproduced.

tests/golden holds three tiny random models that were run through the official code in float32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter_fast import SegmenterModel, reference

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["seg_mask_16", "seg_deit_mask_16", "seg_linear_8"]
IMAGES = [0, 1, 2]  # the training size, sides that no patch divides, another grid
TOLERANCE = 1e-4  # relative to the largest value


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    with np.load(GOLDEN / request.param / "io.npz") as stored:
        values = {key: torch.from_numpy(stored[key]) for key in stored}
    return SegmenterModel.from_pretrained(GOLDEN / request.param), values


def assert_close(name, ours, theirs):
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} != {tuple(theirs.shape)}"
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e} > {TOLERANCE:.0e}"


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("index", IMAGES)
def test_logits_and_labels(golden, backend, index):
    model, values = golden
    model.backend = backend
    expected = values[f"logits{index}"]
    with torch.inference_mode():
        assert_close("logits", model(values[f"image{index}"]), expected)
        labels = model.labels(values[f"image{index}"]).long()
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("index", IMAGES)
def test_loss_and_gradients(golden, backend, index):
    model, values = golden
    model.backend = backend
    model.zero_grad()
    loss = model(values[f"image{index}"], values[f"target{index}"])
    assert_close("loss", loss.detach(), values[f"loss{index}"])
    loss.backward()
    parameters = dict(model.named_parameters())
    prefix = f"grad{index}/"
    names = [key.removeprefix(prefix) for key in values if key.startswith(prefix)]
    assert names
    for name in names:
        assert_close(name, parameters[name].grad, values[prefix + name])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_attention_map(golden, backend):
    model, values = golden
    model.backend = backend
    height, width = model.config.image_size
    x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.get_attention_map_enc(x, 1)
    assert_close("attention", ours, values["attention_encoder_layer1"])


@pytest.mark.parametrize("index", IMAGES)
def test_specification(golden, index):
    """reference.py, which shares no code with the modules, agrees with the official code too."""
    model, values = golden
    state, config = model.state_dict(), model.config
    image, target = values[f"image{index}"], values[f"target{index}"]
    assert_close("logits", reference.logits(image, state, config), values[f"logits{index}"])
    assert_close("loss", reference.loss(image, target, state, config), values[f"loss{index}"])


def test_specification_attention(golden):
    model, values = golden
    state, config = model.state_dict(), model.config
    x = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(1))
    expected = values["attention_encoder_layer1"]
    assert_close("encoder", reference.encoder_attention(x, state, config, 1), expected)
    if config.decoder == "mask_transformer":
        with torch.inference_mode():
            ours = model.get_attention_map_dec(x, 1)
        assert_close("decoder", ours, reference.decoder_attention(x, state, config, 1))
        assert ours.shape[-1] == 16 + config.n_cls


def test_train_mode_without_randomness_equals_evaluation(golden):
    """`forward(images, target)` in training mode takes the same path once nothing is random."""
    model, values = golden
    config = model.config.replace(drop_path_rate=0.0, decoder_dropout=0.0)
    from segmenter_fast.variants import create_model_from_config

    other = create_model_from_config(config)
    other.load_state_dict(model.state_dict())
    other.train()
    loss = other(values["image0"], values["target0"])
    assert_close("loss", loss.detach(), values["loss0"])
