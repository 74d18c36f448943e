"""Drop-in modules: subclasses of ``torch.nn``'s with the same constructor, state_dict and semantics."""

from .layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

#: torch's class -> ours, for ``fastseq.accelerate``. Only direct subclasses without state of their own.
DROP_IN = {cls.__base__: cls for cls in (LayerNorm, RMSNorm)}

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
