"""Operations with one fault each, for the compile report to find, and one without.

Not interpreted: imported by processes without TRITON_INTERPRET alone.
"""

import os

import torch

from segmenter_fast.ops._triton import Config, Kernel, Operation, dot, launch, tl, triton


@triton.jit
def _product_kernel(
    a_ptr,  # (BLOCK, BLOCK)
    b_ptr,  # (BLOCK, BLOCK)
    c_ptr,  # (BLOCK, BLOCK) float32
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + at).to(DTYPE), tl.load(b_ptr + at).to(DTYPE)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    tl.store(c_ptr + at, dot(a, b, acc))


@triton.jit
def _two_passes_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # (BLOCK, BLOCK), (BLOCK,)
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes[:, None] * BLOCK + lanes[None, :])
    # Every thread holds a hundred values over two passes.
    scaled = x / tl.sum(x, 1)[:, None] - tl.max(x, 0)[None, :]
    tl.store(y_ptr + lanes, tl.sum(scaled * x, 1))


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 3, "only for three")


def _operation(name, kernel, **constexprs):
    def run(x):
        arguments = (x, x, torch.empty_like(x, dtype=torch.float32))
        arguments = arguments[: len(kernel.function.arg_names) - len(constexprs) - 1]
        launch(kernel, (1,), kernel.config(x), *arguments, **constexprs)
        return x

    return Operation(
        name=name,
        make_inputs=lambda dtype, size: {"x": torch.ones(size, dtype=dtype)},
        run=run,
        reference=run,
        case={"size": (128, 128)},
        checks=(),
        toy={},
        work=lambda inputs: (2 * 128**3, 3 * 128**2 * inputs["x"].element_size()),
        matrix=kernel.matrix,
        dtypes=(torch.bfloat16,),
    )


def _kernel(function, matrix=False, block=128, **options):
    return Kernel(function, {"default": (Config({"BLOCK": block}, **options),)}, matrix=matrix)


OPERATIONS = (
    _operation("good", _kernel(_product_kernel, matrix=True, block=64), DTYPE=tl.bfloat16),
    _operation("upcast", _kernel(_product_kernel, matrix=True, block=16), DTYPE=tl.float32),
    _operation("small", _kernel(_product_kernel, matrix=True, block=16), DTYPE=tl.bfloat16),
    _operation("spilling", _kernel(_two_passes_kernel, maxnreg=32)),
    _operation("large", _kernel(_product_kernel, matrix=True, block=256), DTYPE=tl.bfloat16),
    _operation("broken", _kernel(_broken_kernel)),
)


class _Crashing:
    @staticmethod
    def warmup(**arguments):
        os._exit(3)


crashing = _Crashing()
