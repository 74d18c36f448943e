"""LayerNorm as a function: the same result and gradients as torch's, and which kernel made them.

python examples/layer_norm.py
"""

import torch
import torch.nn.functional as F

import fastseq
from fastseq.functional import layer_norm


def main() -> None:
    """Compare fastseq's layer_norm with torch's, forward and backward, then ask what ran."""
    torch.manual_seed(0)
    x = torch.randn(32, 128, 256, requires_grad=True)  # [batch, length, width]
    weight = torch.rand(256, requires_grad=True)
    bias = torch.randn(256, requires_grad=True)
    grad = torch.randn(32, 128, 256)

    def gradients(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, (x, weight, bias), grad)

    ours = layer_norm(x, (256,), weight, bias)
    theirs = F.layer_norm(x, (256,), weight, bias)
    print(f"output: largest difference {(ours - theirs).abs().max():.1e}")
    torch.testing.assert_close(ours, theirs)

    names = ("input", "weight", "bias")
    for name, our, their in zip(names, gradients(ours), gradients(theirs), strict=True):
        # A weight's gradient is a sum over all 4096 rows, so compare it with its own size.
        relative = (our - their).norm() / their.norm()
        print(f"gradient of {name}: relative difference {relative:.1e}")
        assert relative < 1e-5

    print(fastseq.explain(lambda: gradients(layer_norm(x, (256,), weight, bias))))


if __name__ == "__main__":
    main()
