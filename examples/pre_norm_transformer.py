"""A pre-norm Transformer block whose residual adds and norms are one kernel each.

Written as usual, a block is ``x = x + attention(norm1(x)); x = x + feed_forward(norm2(x))``:
every add writes the stream to memory, and the norm behind it reads it again.
``AddLayerNorm(branch, stream)`` does both at once and returns the normalized and the new stream. So
a block takes what the one before it has not yet added, and hands its own on.

    python examples/pre_norm_transformer.py
"""

import torch
from torch import Tensor, nn

import fastseq


class Block(nn.Module):
    """Takes and returns ``(branch, stream)``: the stream, and what is still to be added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = fastseq.nn.AddLayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = fastseq.nn.AddLayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        h, stream = self.norm1(branch, stream)
        branch, _ = self.attention(h, h, h, need_weights=False)
        h, stream = self.norm2(branch, stream)
        return self.feed_forward(h), stream


def unfused(block: Block, x: Tensor) -> Tensor:
    """The same block from torch's parts, with the same parameters."""

    def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, module.normalized_shape, module.weight, module.bias)

    h = norm(block.norm1, x)
    x = x + block.attention(h, h, h, need_weights=False)[0]
    return x + block.feed_forward(norm(block.norm2, x))


def main() -> None:
    """Run a stack of three blocks both ways, and compare outputs and gradients."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(64, heads=4) for _ in range(3))
    x = torch.randn(4, 32, 64, requires_grad=True)

    branch, stream = torch.zeros_like(x), x
    for block in blocks:
        branch, stream = block(branch, stream)
    fused = stream + branch

    expected = x
    for block in blocks:
        expected = unfused(block, expected)

    print(f"output: largest difference {(fused - expected).abs().max():.1e}")
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(fused.pow(2).sum(), x)
    (theirs,) = torch.autograd.grad(expected.pow(2).sum(), x)
    print(f"gradient: relative difference {(ours - theirs).norm() / theirs.norm():.1e}")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    main()
