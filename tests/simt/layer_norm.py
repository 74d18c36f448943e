"""Layer norm as the tests call it on the emulated device, and what it must come to, in fp64.

Tolerances are derived, not tuned. Every kernel computes in fp32 with unit roundoff u = 2^-24, and
a sum over a row passes through at most DEPTH additions: up to 33 elements in a thread, 5 exchanges
in a warp and 16 warps. A sum of depth D is off by at most D * u * sum|terms|; each other operation
adds u of its result; the store adds half a unit in the last place of the output's dtype.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from simt.host import Host

U = 2.0**-24
DEPTH = 54
SM_COUNT = 3  # small, so that blocks of the persistent backward take several tiles of rows
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
CODES = {name: code for code, name in enumerate(("f32", "f16", "bf16", "f64"))}
HALF_ULP_BITS = {"f32": 24, "f16": 11, "bf16": 8}  # of a number in [1, 2): 2^-bits
SMALLEST_HALF_ULP = {"f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}


def half_ulp(dtype: str, magnitude: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(magnitude))
    return np.maximum(np.exp2(exponent - HALF_ULP_BITS[dtype]), SMALLEST_HALF_ULP[dtype])


def check(actual: np.ndarray, expected: np.ndarray, error: np.ndarray, dtype: str) -> None:
    """``error``: the bound on what was computed before it was rounded to ``dtype``."""
    assert actual.shape == expected.shape
    assert not np.isnan(actual).any()
    bound = error + half_ulp(dtype, np.abs(expected) + error)
    excess = np.abs(actual - expected) / bound
    assert excess.size == 0 or excess.max() <= 1, f"{excess.max()} of the bound"


class Arguments:
    """What a call takes: buffers, integers and reals in the order the server reads them."""

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []
        self.integers: list[int] = []
        self.reals: list[float] = []

    def absent(self, fields: int) -> None:
        self.integers += [-1, 0, 0] + [1] * fields


def to_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(DTYPES[dtype])
    return tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, "u1")


def to_floats(data: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(data.copy()).view(DTYPES[dtype]).double().numpy()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(values).to(DTYPES[dtype]).double().numpy()


class Matrix:
    """Rows in memory under some layout; the bytes between them are poison that must stay."""

    def __init__(self, shape: tuple[int, int], dtype: str, layout: str = "contiguous") -> None:
        rows, length = shape
        self.shape, self.dtype = shape, dtype
        self.size = DTYPES[dtype].itemsize
        self.offset = 0
        self.inner, self.outer_stride, self.inner_stride = 1, length, 0
        if layout == "padded":
            self.outer_stride = length + 8
        elif layout == "ragged":
            self.outer_stride = length + 3
        elif layout == "shifted":
            self.offset = 1
        elif layout == "permuted":  # [inner, outer, length] seen as [outer, inner, length]
            self.inner = 5
            self.inner_stride = -(-rows // 5) * length
        elif layout == "broadcast":
            self.outer_stride = 0
        row = np.arange(rows)
        self.begins = (
            self.offset
            + row // self.inner * self.outer_stride
            + row % self.inner * self.inner_stride
        )
        elements = int(self.begins.max()) + length if rows else 0
        self.data = np.full(elements * self.size, 0xFF, np.uint8)
        self.before = self.data.copy()

    def indices(self) -> np.ndarray:
        columns = np.arange(self.shape[1] * self.size)
        return self.begins[:, None] * self.size + columns[None]

    def fill(self, values: np.ndarray) -> Matrix:
        if self.shape[0] and self.shape[1]:
            self.data[self.indices()] = to_bytes(values, self.dtype).reshape(self.shape[0], -1)
        self.before = self.data.copy()
        return self

    def values(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape)
        return to_floats(self.data[self.indices()].reshape(-1), self.dtype).reshape(self.shape)

    def check_gaps(self) -> None:
        gaps = np.ones(len(self.data), bool)
        gaps[self.indices().reshape(-1)] = False
        np.testing.assert_array_equal(self.data[gaps], self.before[gaps])

    def add_to(self, arguments: Arguments) -> None:
        arguments.integers += [len(arguments.buffers), self.offset * self.size, CODES[self.dtype]]
        arguments.integers += [self.inner, self.outer_stride, self.inner_stride]
        arguments.buffers.append(self.data)


def add_matrix(arguments: Arguments, matrix: Matrix | None) -> None:
    if matrix is None:
        arguments.absent(3)
    else:
        matrix.add_to(arguments)


def add_vector(arguments: Arguments, data: np.ndarray | None, dtype: str) -> None:
    if data is None:
        arguments.absent(0)
    else:
        arguments.integers += [len(arguments.buffers), 0, CODES[dtype]]
        arguments.buffers.append(data)


def mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_bits(seed: int, rows: int, columns: int) -> np.ndarray:
    """The twin of csrc/math/random.h. [rows, columns]"""
    row = np.arange(rows, dtype=np.uint64)[:, None]
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF)
    first = mix(mix(np.full_like(row, low, np.uint32)) ^ row.astype(np.uint32))
    second = mix(mix(first + high) ^ (row >> np.uint64(32)).astype(np.uint32))
    x = np.arange(columns, dtype=np.uint32)[None] + first
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ second
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@dataclasses.dataclass(frozen=True)
class Norm:
    input: str = "f32"
    residual: str | None = None
    output: str = "f32"
    weight: str | None = "f32"
    bias: str | None = "f32"
    dropout: float = 0.0
    rms: bool = False
    eps: float = 1e-5
    mean: float = 0.0
    layout: str = "contiguous"

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "f32"

    @property
    def x(self) -> str:
        return self.residual or self.input


SEED = -0x123456789ABCDEF


def parameters(norm: Norm, shape: tuple[int, int]) -> dict[str, np.ndarray]:

    def draw(index: int, dtype: str | None, size: tuple[int, ...]) -> np.ndarray:
        # The rows of a small batch are the first of a larger one.
        generator = np.random.default_rng([shape[1], index])
        return rounded(generator.standard_normal(size) + means.get(index, 0), dtype or "f32")

    means = {0: norm.mean, 2: 1.0}
    drawn = {
        "input": draw(0, norm.input, shape),
        "residual": draw(1, norm.x, shape),
        "weight": draw(2, norm.weight, shape[1:]),
        "bias": draw(3, norm.bias, shape[1:]),
        "grad_output": draw(4, norm.output, shape),
        "grad_new_residual": draw(5, norm.x, shape),
    }
    kept = random_bits(SEED, *shape) >= np.uint32(norm.dropout * 2**32)
    drawn["keep"] = kept / (1 - norm.dropout) if norm.dropout else np.ones(shape)
    if norm.weight is None:
        drawn["weight"] = np.ones(shape[1])
    if norm.bias is None:
        drawn["bias"] = np.zeros(shape[1])
    return drawn


def add_dropout(arguments: Arguments, norm: Norm) -> None:
    if norm.dropout:
        arguments.integers += [len(arguments.buffers), 0, int(norm.dropout * 2**32)]
        arguments.buffers.append(np.array([SEED]))
    else:
        arguments.integers += [-1, 0, 0]
    arguments.reals.append(1 / (1 - norm.dropout))


def schedule(shape: tuple[int, int], seed: int | None) -> int:
    """Another order of the threads for every shape, where a test asks for none in particular."""
    return shape[0] * 65537 + shape[1] if seed is None else seed


def run_forward(
    host: Host, norm: Norm, shape: tuple[int, int], seed: int | None = None
) -> tuple[Matrix, Matrix | None, np.ndarray, np.ndarray]:
    rows, length = shape
    given = parameters(norm, shape)
    layout = "contiguous" if norm.layout == "broadcast" else norm.layout
    output = Matrix(shape, norm.output, layout)
    new_residual = Matrix(shape, norm.x, layout) if norm.residual else None
    mean, rstd = (np.full(rows, np.nan, np.float32) for _ in range(2))
    arguments = Arguments()
    arguments.integers += [rows, length]
    add_matrix(arguments, Matrix(shape, norm.input, layout).fill(given["input"]))
    residual = Matrix(shape, norm.x, layout).fill(given["residual"]) if norm.residual else None
    add_matrix(arguments, residual)
    for name, dtype in (("weight", norm.weight), ("bias", norm.bias)):
        add_vector(arguments, to_bytes(given[name], dtype) if dtype else None, dtype or "f32")
    add_dropout(arguments, norm)
    arguments.reals.append(norm.eps)
    arguments.integers.append(norm.rms)
    add_matrix(arguments, output)
    add_matrix(arguments, new_residual)
    add_vector(arguments, None if norm.rms else mean, "f32")
    add_vector(arguments, rstd, "f32")
    before = [buffer.copy() for buffer in arguments.buffers]
    error = host.call(
        "layer_norm_forward",
        arguments.buffers,
        arguments.integers,
        arguments.reals,
        schedule(shape, seed),
    )
    assert error is None, error
    written = [id(array) for array in (output.data, mean, rstd)]
    written += [id(new_residual.data)] if new_residual else []
    for old, new in zip(before, arguments.buffers, strict=True):
        assert id(new) in written or np.array_equal(old, new), "an input was modified"
    output.check_gaps()
    return output, new_residual, mean, rstd


def check_forward(host: Host, norm: Norm, shape: tuple[int, int]) -> None:
    rows = shape[0]
    output, new_residual, mean, rstd = run_forward(host, norm, shape)
    if 0 in shape:
        return
    given = parameters(norm, shape)
    x = given["input"]
    if new_residual is not None:
        dropped = given["keep"] * x
        x = given["residual"] + dropped
        check(new_residual.values(), x, 3 * U * (np.abs(x) + np.abs(dropped)), norm.x)
        new_residual.check_gaps()
        x = new_residual.values()  # the rounded sum is what has to be normalised
    expected_mean = np.zeros((rows, 1)) if norm.rms else x.mean(1, keepdims=True)
    expected_rstd = 1 / np.sqrt(((x - expected_mean) ** 2).mean(1, keepdims=True) + norm.eps)
    mean_error = 0 * expected_mean
    if not norm.rms:
        mean_error = DEPTH * U * np.abs(x).mean(1, keepdims=True)
        check(mean[:, None].astype(float), expected_mean, mean_error, "f32")
    # The variance is off by its own sum and by the square of what the centre is off.
    shift = mean_error * expected_rstd
    rstd_error = DEPTH * U + shift**2
    check(rstd[:, None].astype(float), expected_rstd, rstd_error * expected_rstd, "f32")
    normalised = (x - expected_mean) * expected_rstd
    scaled = np.abs(normalised * given["weight"])
    expected = normalised * given["weight"] + given["bias"]
    error = np.abs(given["weight"]) * shift + scaled * rstd_error
    error += 5 * U * (scaled + np.abs(given["bias"]) + np.abs(given["weight"]) * shift)
    check(output.values(), expected, error, norm.output)


def run_backward(
    host: Host,
    norm: Norm,
    shape: tuple[int, int],
    seed: int | None = None,
    wanted: list[str] | None = None,
) -> dict[str, Matrix | np.ndarray]:
    rows, length = shape
    given = parameters(norm, shape)
    layout = "contiguous" if norm.layout == "broadcast" else norm.layout
    x, mean, rstd = saved(norm, shape)
    separate_input = bool(norm.dropout) or norm.input != norm.x
    result: dict[str, Matrix | np.ndarray] = {"grad_x": Matrix(shape, norm.x, layout)}
    if separate_input:
        result["grad_input"] = Matrix(shape, norm.input, layout)
    for name, dtype in (("weight", norm.weight), ("bias", norm.bias)):
        if dtype:
            size = length * DTYPES[dtype].itemsize
            result[f"grad_{name}"] = np.full(size, 0xFF, np.uint8)
    result = {name: value for name, value in result.items() if wanted is None or name in wanted}
    count = np.zeros(1, np.int64)
    host.call("layer_norm_partial_rows", [count], [rows, length, SM_COUNT, 0, 0])
    partials = np.full((2, count[0], length), np.nan, np.float32)

    arguments = Arguments()
    arguments.integers += [rows, length]
    add_matrix(arguments, Matrix(shape, norm.output, norm.layout).fill(grad_output(norm, given)))
    residual = Matrix(shape, norm.x, layout).fill(given["grad_new_residual"])
    add_matrix(arguments, residual if norm.residual else None)
    add_matrix(arguments, Matrix(shape, norm.x, layout).fill(x))
    add_vector(
        arguments,
        to_bytes(given["weight"], norm.weight) if norm.weight else None,
        norm.weight or "f32",
    )
    add_vector(arguments, None if norm.rms else mean.astype(np.float32), "f32")
    add_vector(arguments, rstd.astype(np.float32), "f32")
    add_dropout(arguments, norm)
    arguments.integers.append(norm.rms)
    for name in ("grad_x", "grad_input"):
        add_matrix(arguments, result.get(name))
    for name, dtype in (("weight", norm.weight), ("bias", norm.bias)):
        add_vector(arguments, result.get(f"grad_{name}"), dtype or "f32")
    arguments.integers += [len(arguments.buffers), 0, int(count[0])]
    arguments.buffers.append(partials)
    error = host.call(
        "layer_norm_backward",
        arguments.buffers,
        arguments.integers,
        arguments.reals,
        schedule(shape, seed),
    )
    assert error is None, error
    for matrix in result.values():
        if isinstance(matrix, Matrix):
            matrix.check_gaps()
    return result


def grad_output(norm: Norm, given: dict[str, np.ndarray]) -> np.ndarray:
    grad = given["grad_output"]
    return np.broadcast_to(grad[:1], grad.shape) if norm.layout == "broadcast" else grad


def saved(norm: Norm, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the forward keeps: x, mean and rstd, in fp64 but rounded as they are stored."""
    given = parameters(norm, shape)
    x = given["input"]
    if norm.residual:
        x = rounded(given["residual"] + given["keep"] * x, norm.x)
    if 0 in shape:
        return x, np.zeros(shape[0]), np.zeros(shape[0])
    mean = np.zeros(shape[0]) if norm.rms else rounded(x.mean(1), "f32")
    rstd = rounded(1 / np.sqrt(((x - mean[:, None]) ** 2).mean(1) + norm.eps), "f32")
    return x, mean, rstd


def check_backward(host: Host, norm: Norm, shape: tuple[int, int]) -> None:
    rows = shape[0]
    result = run_backward(host, norm, shape)
    given = parameters(norm, shape)
    x, mean, rstd = saved(norm, shape)
    normalised = (x - mean[:, None]) * rstd[:, None]
    grad = grad_output(norm, given)
    # One addition a row, then over the teams of a block and the blocks: never more than 2 * rows.
    for name, terms in (("grad_weight", grad * normalised), ("grad_bias", grad)):
        if name in result:
            dtype = getattr(norm, name.removeprefix("grad_"))
            error = (2 * rows + 4) * U * np.abs(terms).sum(0)
            check(to_floats(result[name], dtype), terms.sum(0), error, dtype)
    if 0 in shape:
        return
    g = grad * given["weight"]
    slope = (g * normalised).mean(1, keepdims=True)
    offset = 0 if norm.rms else g.mean(1, keepdims=True)
    grad_x = rstd[:, None] * (g - offset - normalised * slope)
    error = 5 * U * (np.abs(g) + np.abs(offset) + np.abs(normalised * slope))
    error += (DEPTH + 5) * U * np.abs(normalised) * np.abs(g * normalised).mean(1, keepdims=True)
    error += 0 if norm.rms else DEPTH * U * np.abs(g).mean(1, keepdims=True)
    error *= rstd[:, None]
    if norm.residual:
        grad_x = grad_x + given["grad_new_residual"]
        error += 2 * U * np.abs(grad_x)
    check(result["grad_x"].values(), grad_x, error, norm.x)
    if "grad_input" in result:
        error = given["keep"] * error + 2 * U * np.abs(given["keep"] * grad_x)
        check(result["grad_input"].values(), given["keep"] * grad_x, error, norm.input)
