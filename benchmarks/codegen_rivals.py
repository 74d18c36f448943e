"""Public kernels that install as packages, compiled like ours: where ours stand without a GPU.

Liger's for norms, softmax, cross-entropy, rotary embedding and SwiGLU; for attention the Triton
kernel of flash-linear-attention (``fla-core``), whose tiles the launcher chooses without timing
them. None is required, and none is run: what they launch for a shape is compiled and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from .registry import Sizes

#: The architecture and dtype of the comparison.
ARCHITECTURE, DTYPE = 90, "bf16"
_ROWS = 300


@dataclass(frozen=True)
class Rival:
    """A launch of a package's kernels, and the operator and sizes of ours that do the same."""

    package: str
    operator: str
    sizes: Sizes
    call: Callable[[], object]


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in ("liger-kernel", "fla-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def rivals() -> Iterator[Rival]:
    """Those whose package is installed."""
    installed = versions()
    if "liger-kernel" in installed:
        yield from _liger()
    if "fla-core" in installed:
        yield from _flash_linear_attention()


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _liger() -> Iterator[Rival]:
    from liger_kernel.ops import cross_entropy, layer_norm, rms_norm, rope, softmax, swiglu
    from liger_kernel.ops.utils import calculate_settings

    def rival(operator: str, sizes: Sizes, call: Callable[[], object]) -> Rival:
        return Rival("liger-kernel", operator, sizes, call)

    for n in (1024, 4096, 16384):
        sizes: Sizes = {"leading": (_ROWS,), "normalized": (n,)}
        yield rival("layer_norm", sizes, lambda n=n: _liger_layer_norm(layer_norm, n))
        settings = calculate_settings(n)
        yield rival("rms_norm", sizes, lambda n=n, s=settings: _liger_rms_norm(rms_norm, n, s))
    for n in (1024, 4096, 16384):
        yield rival("softmax", {"shape": (_ROWS, n)}, lambda n=n: _liger_softmax(softmax, n))
    for n in (32000, 128256):
        sizes = {"leading": (_ROWS,), "classes": n, "ignored": 0.0}
        yield rival("cross_entropy", sizes, lambda n=n: _liger_loss(cross_entropy, n))
    q, angles = _empty(1, 8, 256, 128), _empty(1, 256, 128)
    sizes = {"shape": tuple(q.shape), "interleaved": False}
    yield rival("rotary_embedding", sizes, lambda: rope.rope_forward(q, q, angles, angles))
    wide = 11008
    sizes = {"leading": (_ROWS,), "size": 256, "wide": wide, "activation": "swiglu"}
    yield rival("feed_forward", sizes, lambda: _liger_swiglu(swiglu, wide))


def _liger_layer_norm(module: Any, n: int) -> None:
    x, w, rows = _empty(_ROWS, n), _empty(n), _empty(_ROWS, dtype=torch.float32)
    module.layer_norm_forward(x, w, w, 1e-5)
    module.layer_norm_backward(x, x, w, w, rows, rows)


def _liger_rms_norm(module: Any, n: int, settings: tuple[int, int]) -> None:
    x, w, rows = _empty(_ROWS, n), _empty(n), _empty(_ROWS, dtype=torch.float32)
    module.rms_norm_forward(x, w, 1e-6, 0.0, "llama", None)
    casting = module._str_to_casting_mode["llama"]
    module.rms_norm_backward(x, x, w, rows, 0.0, casting, *settings, False, None)


def _liger_softmax(module: Any, n: int) -> None:
    x = _empty(_ROWS, n)
    _, *settings = module._softmax_forward(x)
    module._softmax_backward(x, x, *settings)


def _liger_loss(module: Any, n: int) -> None:
    target = torch.zeros(_ROWS, dtype=torch.int64)
    options = (-100, 0.0, 0.0, "mean", None, False)
    module.cross_entropy_forward(_empty(_ROWS, n), target, None, *options)


def _liger_swiglu(module: Any, n: int) -> None:
    x = _empty(_ROWS, n)
    module.swiglu_forward(x, x)
    module.swiglu_backward(x, x, x)


def _flash_linear_attention() -> Iterator[Rival]:
    from fla.ops.attn import parallel

    def hopper(architecture: str = "none", *_: Any) -> bool:
        return True  # the launcher asks for the largest first

    def both(head_dim: int) -> None:
        asks, parallel.check_shared_mem = parallel.check_shared_mem, hopper
        x, lse = _empty(1, 512, 2, head_dim), _empty(1, 512, 2, dtype=torch.float32)
        try:
            parallel.parallel_attn_fwd(x, x, x, None, None, 0.125)
            parallel.parallel_attn_bwd(x, x, x, x, None, lse, x, None, 0.125)
        finally:
            parallel.check_shared_mem = asks

    for head_dim in (64, 128):
        sizes = {"batch": 1, "heads": 2, "lengths": (512, 512), "head_dim": head_dim}
        sizes |= {"drop_in": True, "is_causal": True}
        yield Rival("fla-core", "scaled_dot_product_attention", sizes, lambda d=head_dim: both(d))
