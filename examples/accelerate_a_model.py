"""A finished PyTorch model on fastseq's kernels, and back.

python examples/accelerate_a_model.py
"""

import torch
from torch import nn

import fastseq


def main() -> None:
    """Accelerate a Transformer encoder, see what was swapped, and that its numbers stay."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True
    )
    model = nn.Sequential(
        nn.Embedding(100, 64),
        nn.TransformerEncoder(layer, num_layers=2),
        nn.RMSNorm(64),
        nn.Linear(64, 100),
    )
    tokens = torch.randint(100, (8, 32))
    before = model(tokens)

    fastseq.accelerate(model, exclude=["1.layers.0.norm1"])
    print(fastseq.explain(model))  # every module that might have been swapped, and why (not)
    after = model(tokens)
    print(f"\nlargest difference: {(after - before).abs().max():.1e}")
    torch.testing.assert_close(after, before)

    print(fastseq.explain(model, tokens))  # every call, and the kernel that ran it

    fastseq.restore(model)
    assert type(model[2]) is nn.RMSNorm
    assert torch.equal(model(tokens), before)


if __name__ == "__main__":
    main()
