"""Cross-entropy as a drop-in module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on our kernels.

    See :func:`fastseq.functional.cross_entropy`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.cross_entropy(
                input,
                target,
                self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
