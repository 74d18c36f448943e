"""The public functions: ``torch.nn.functional``'s names and signatures, and fused ones beside."""

from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
