"""The public functions: ``torch.nn.functional``'s names and signatures, and fused ones beside."""

from .additive_attention import additive_attention
from .attention import attention, scaled_dot_product_attention
from .attention_weights import attention_weights
from .cross_entropy import cross_entropy
from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .linear_cross_entropy import linear_cross_entropy
from .rotary_embedding import rotary_embedding
from .sample import sample
from .softmax import log_softmax, masked_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "attention",
    "attention_weights",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "masked_softmax",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
]
