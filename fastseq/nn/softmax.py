"""Softmax and LogSoftmax as drop-in modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class Softmax(torch.nn.Softmax):
    """:class:`torch.nn.Softmax` on fastseq's kernels; see :func:`fastseq.functional.softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.softmax(input, self.dim, _stacklevel=5)
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` on fastseq's kernels.

    See :func:`fastseq.functional.log_softmax`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.log_softmax(input, self.dim, _stacklevel=5)
        return functional.log_softmax(input, self.dim, _stacklevel=5)
