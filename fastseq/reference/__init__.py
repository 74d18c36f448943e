"""The specification: naive PyTorch that reads like the formula, for any dtype, differentiable.

Every kernel is tested against it, and what a kernel cannot do (double backward, ``torch.func``
transforms, forward-mode AD) runs on it.
"""
