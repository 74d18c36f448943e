"""Drop-in modules: ``torch.nn``'s subclassed, with their constructor, state_dict and semantics."""

import torch

from .layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

#: torch's class -> ours, for ``fastseq.accelerate``: direct subclasses without state of their own.
DROP_IN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
}

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
