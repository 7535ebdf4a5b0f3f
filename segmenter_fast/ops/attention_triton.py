"""Attention on a GPU, forward and backward, in flash style: no N x N weights.

With q, k, v (N, d) of one head, c = log2(e) / sqrt(d) and dropout's mask z in {0, 1 / (1 - p)}

    s = c q k^T        e_i = log2 sum_j 2^s_ij        P = 2^(s - e)        y = (z P) v

Powers of two are what the hardware has, hence c and e. The sum is taken online: with every block
of keys the maximum so far may grow, and what was summed before shrinks by 2^(old - new). Kept for
the gradient is e alone, from which P follows in one step. Backward, from the upstream gradient u,

    delta_i = <u_i, y_i>        dP = z (u v^T)        dS = P (dP - delta)
    dq = dS k / sqrt(d)         dk = dS^T q / sqrt(d)         dv = (z P)^T u

in two kernels: one owns queries and sums over keys, the other owns keys and sums over queries. This
takes two matrix products more than adding everybody's dq up in memory, and gives the same bits in
every run. q, k and v are read from the packed projection where they lie, whatever its strides, and
their gradients are written in the same form.

Dropout's mask is not kept: Philox makes it again from a seed and the position of each weight. The
seed is drawn on the device by PyTorch's generator, so `torch.manual_seed` and activation
checkpointing reproduce it.

Loads are ordinary asynchronous copies, not those of the tensor memory accelerator: one that has
not run on such a GPU yet gains nothing for certain, and needs memory from the host at each launch.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.ops._attention_triton import FORWARD, KEYS, QUERIES, choose
from segmenter_fast.ops._triton import (
    Operation,
    accumulator,
    check_device,
    launch,
    next_power_of_2,
)
from segmenter_fast.ops.attention import attention_reference
from segmenter_fast.ops.upsample import upcast

MOST_CHANNELS = 256
"""Of one head: what a program's blocks hold."""


# --------------------------------------------------------------------------- operators
@torch.library.custom_op(
    "segmenter_fast::attention_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _attention_op(
    qkv: Tensor, seed: Tensor, dropout_p: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The values y (B, N, H d), and e (B, H, N), which is empty without `with_gradient`."""
    _check(qkv)
    y, e = _empty(qkv, with_gradient)
    kernel = choose(FORWARD, qkv.dtype, qkv.shape[4])
    config = kernel.config(qkv)
    blocks = -(-qkv.shape[1] // config["ROWS"])
    launch(
        kernel,
        (qkv.shape[0] * qkv.shape[3] * blocks,),
        config,
        *(qkv, seed, y, e, *_sizes(qkv), blocks),
        **_constants(qkv, dropout_p),
        KEEP=with_gradient,
    )
    return y, e


def _empty(qkv: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    batch, n, _, heads, d = qkv.shape
    e = upcast(qkv.new_empty(0))
    return qkv.new_empty(batch, n, heads * d), e.new_empty((batch, heads, n) * with_gradient or 0)


def _sizes(qkv: Tensor) -> tuple[int, ...]:
    return *qkv.stride(), qkv.shape[1], qkv.shape[3]


def _constants(qkv: Tensor, dropout_p: float) -> dict[str, Any]:
    d = qkv.shape[4]
    return {
        "DTYPE": accumulator(qkv.dtype),
        "SCALE": math.log2(math.e) / math.sqrt(d),
        "THRESHOLD": round(dropout_p * 2**31),
        "INVERSE": 1.0 / (1.0 - dropout_p),
        "D": d,
        # No fewer channels than a matrix instruction takes.
        "BLOCK_D": max(16, next_power_of_2(d)),
    }


@_attention_op.register_fake
def _(qkv: Tensor, seed: Tensor, dropout_p: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _empty(qkv, with_gradient)


def _check(qkv: Tensor) -> None:
    check_device(qkv)
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if qkv.dtype not in allowed:
        raise TypeError(f"qkv must be float16, bfloat16, float32 or float64, got {qkv.dtype}")
    if qkv.shape[4] > MOST_CHANNELS:
        raise ValueError(
            f"a head may have up to {MOST_CHANNELS} channels with backend 'triton', got "
            f"{qkv.shape[4]}; use backend='reference'"
        )


@torch.library.custom_op(
    "segmenter_fast::attention_triton_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _attention_backward_op(
    upstream: Tensor, qkv: Tensor, seed: Tensor, y: Tensor, e: Tensor, dropout_p: float
) -> Tensor:
    """Gradient of qkv, contiguous."""
    batch, n, _, heads, d = qkv.shape
    upstream = upstream.contiguous()
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(e)
    constants = {**_constants(qkv, dropout_p), "ROOT": 1.0 / math.sqrt(d)}
    for table, arguments in (
        (QUERIES, (qkv, seed, y, upstream, e, gradient, delta)),
        (KEYS, (qkv, seed, upstream, e, delta, gradient)),
    ):
        kernel = choose(table, qkv.dtype, d)
        config = kernel.config(qkv)
        blocks = -(-n // config["ROWS"])
        grid = (batch * heads * blocks,)
        launch(kernel, grid, config, *arguments, *_sizes(qkv), blocks, **constants)
    return gradient


@_attention_backward_op.register_fake
def _(
    upstream: Tensor, qkv: Tensor, seed: Tensor, y: Tensor, e: Tensor, dropout_p: float
) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "attention cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_attention_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    qkv, seed, dropout_p, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError("qkv requires a gradient: call the operator with with_gradient=True")
    ctx.mark_non_differentiable(output[1])
    ctx.dropout_p = dropout_p
    ctx.save_for_backward(qkv, seed, *output)


def _backward(
    ctx: Any, upstream: Tensor, *unused: Tensor | None
) -> tuple[Tensor, None, None, None]:
    op = torch.ops.segmenter_fast.attention_triton_backward
    return op(upstream, *ctx.saved_tensors, ctx.dropout_p), None, None, None


_attention_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declarations
def _make_inputs(
    dtype: torch.dtype, batch: int, n: int, heads: int, d: int, p: float = 0.0
) -> dict[str, Any]:
    return {"qkv": torch.randn(batch, n, 3, heads, d).to(dtype), "p": p}


def _run(qkv: Tensor, p: float) -> Tensor:
    seed = torch.full((1,), 7, device=qkv.device)
    return torch.ops.segmenter_fast.attention_triton(qkv, seed, p, qkv.requires_grad)[0]


def _plain(qkv: Tensor, p: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    return y.transpose(1, 2).flatten(2)


def _with(backend: str) -> Any:
    def contestant(qkv: Tensor, p: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return _plain(qkv, p)
        except RuntimeError as error:
            if "No viable backend" in str(error) or "No available kernel" in str(error):
                raise NotImplementedError(f"{backend} does not take {qkv.dtype} here") from error
            raise

    return contestant


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Two products; q, k and v read, y written.
    batch, n, _, heads, d = inputs["qkv"].shape
    return 4 * batch * heads * n * n * d, inputs["qkv"].nbytes * 4 / 3


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Five products: the weights again, dP, dq, dk and dv; also y and its gradient read.
    return 2.5 * _work(inputs)[0], inputs["qkv"].nbytes * 8 / 3


def _declare(name: str, heads: int, d: int, checks: tuple[dict[str, Any], ...]) -> Operation:
    return Operation(
        name=name,
        make_inputs=_make_inputs,
        run=_run,
        reference=lambda qkv, p: attention_reference(qkv),
        case={"batch": 32, "n": 1025, "heads": heads, "d": d},
        checks=checks,
        toy={"batch": 1, "n": 18, "heads": 1, "d": d},
        work=_work,
        backward_work=_backward_work,
        matrix=True,
        gradient_of=("qkv",),
        contestants={
            "SDPA": _plain,
            "SDPA, cuDNN": _with("CUDNN_ATTENTION"),
            "SDPA, flash": _with("FLASH_ATTENTION"),
            "SDPA, efficient": _with("EFFICIENT_ATTENTION"),
        },
    )


OPERATIONS = (
    _declare(
        "attention_triton",
        12,
        64,
        (
            {"batch": 2, "n": 197, "heads": 3, "d": 64},
            {"batch": 1, "n": 1025, "heads": 2, "d": 64},
            {"batch": 1, "n": 1174, "heads": 2, "d": 48},
        ),
    ),
    _declare("attention_32_triton", 6, 32, ({"batch": 1, "n": 333, "heads": 2, "d": 32},)),
    _declare("attention_128_triton", 8, 128, ({"batch": 1, "n": 333, "heads": 2, "d": 128},)),
)
