"""exp2 and log2 of the kernels, in every instruction set, against float64 or the decimal module."""

import decimal
import math

import numpy as np
import pytest

from segmenter_fast import _C

SIMD_LEVELS = _C.build_info()["simd_levels"]
DTYPES = (np.float32, np.float64)

each_level = pytest.mark.parametrize("level", SIMD_LEVELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


@pytest.fixture
def choose(monkeypatch):
    def choose(level):
        monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
        try:
            _C.simd_level()
        except RuntimeError as error:
            pytest.skip(str(error))

    return choose


def kernel(name, x):
    """`_C.exp2` or `_C.log2` of an array, with guard words around the result."""
    y = np.full(len(x) + 32, 77, dtype=x.dtype)
    getattr(_C, name)(x.ctypes.data, y[16:].ctypes.data, len(x), x.dtype.name)
    assert (y[:16] == 77).all() and (y[-16:] == 77).all(), "stray write"
    return y[16:-16]


def exact(name, x):
    """In the next precision: (high, low) with high + low the result to about 30 digits."""
    if x.dtype == np.float32:
        return getattr(np, name)(x.astype(np.float64)), 0.0
    with decimal.localcontext() as context:
        context.prec = 40
        context.Emin, context.Emax = -(10**6), 10**6
        log_2 = decimal.Decimal(2).ln()
        high, low = np.empty_like(x), np.empty_like(x)
        for i, value in enumerate(map(decimal.Decimal, x.tolist())):
            result = (value * log_2).exp() if name == "exp2" else value.ln() / log_2
            high[i] = float(result)
            low[i] = float(result - decimal.Decimal(float(high[i])))
    return high, low


def ulps(name, x):
    """Largest error in units of the last place of the result."""
    high, low = exact(name, x)
    spacing = np.spacing(np.abs(high).astype(x.dtype)).astype(np.float64)
    error = (kernel(name, x).astype(np.float64) - high) - low
    return float(np.max(np.abs(error) / spacing))


def sample(dtype, low, high, n):
    generator = np.random.default_rng(0)
    n = n if dtype == np.float32 else n // 100  # decimal is slow
    return generator.uniform(low, high, n).astype(dtype)


@each_level
@each_dtype
def test_exp2(level, dtype, choose):
    choose(level)
    info = np.finfo(dtype)
    for low, high in [(info.minexp, info.maxexp - 0.01), (-1, 1), (-1e-3, 1e-3)]:
        assert ulps("exp2", sample(dtype, low, high, 200_000)) <= 1.5


@each_level
@each_dtype
def test_exp2_is_exact_at_whole_numbers(level, dtype, choose):
    choose(level)
    info = np.finfo(dtype)
    x = np.arange(info.minexp, info.maxexp, dtype=dtype)
    np.testing.assert_array_equal(kernel("exp2", x), np.ldexp(dtype(1), x.astype(int)))


@each_level
@each_dtype
def test_exp2_stops_at_the_smallest_normal_number(level, dtype, choose):
    choose(level)
    info = np.finfo(dtype)
    x = np.array([info.minexp - 0.01, info.minexp - 1, info.min, -np.inf, np.nan], dtype=dtype)
    np.testing.assert_array_equal(kernel("exp2", x), info.tiny)


@each_level
@each_dtype
def test_log2(level, dtype, choose):
    choose(level)
    info = np.finfo(dtype)
    exponents = sample(np.float64, info.minexp, info.maxexp - 0.01, 200_000)
    assert ulps("log2", np.exp2(exponents).astype(dtype)) <= 2.7
    for low, high in [(0.5, 2), (0.99, 1.01)]:
        assert ulps("log2", sample(dtype, low, high, 200_000)) <= 2.7
    edges = np.array([info.tiny, info.max, 1 - info.epsneg, 1 + info.eps, math.sqrt(0.5)], dtype)
    assert ulps("log2", edges) <= 2.7


@each_level
@each_dtype
def test_log2_is_exact_at_powers_of_two(level, dtype, choose):
    choose(level)
    info = np.finfo(dtype)
    exponents = np.arange(info.minexp, info.maxexp, dtype=dtype)
    np.testing.assert_array_equal(
        kernel("log2", np.ldexp(dtype(1), exponents.astype(int))), exponents
    )


@each_dtype
@pytest.mark.parametrize("n", [0, 1, 3, 15, 17, 33])
def test_any_length(dtype, n):
    x = np.linspace(-3, 3, n, dtype=dtype)
    np.testing.assert_allclose(kernel("exp2", x), np.exp2(x), rtol=1e-6)
    y = np.linspace(1, 3, n, dtype=dtype)
    np.testing.assert_allclose(kernel("log2", y), np.log2(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["exp2", "log2"])
def test_rejects_bad_input(name):
    with pytest.raises(ValueError, match=r'dtype: expected one of .*got "float16"'):
        getattr(_C, name)(0, 0, 0, "float16")
