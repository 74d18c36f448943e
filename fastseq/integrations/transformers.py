"""Hugging Face transformers: fastseq's attention under the name ``"fastseq"``.

The library keeps a table of attention functions and one of functions that make their masks, and its
models look their function up by ``config._attn_implementation`` in each call. :func:`register` adds
ours to both; :func:`fastseq.accelerate` registers it and sets it in the models that it is given, by
the library's own ``set_attn_implementation``. Nothing of the library is replaced.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional

#: What our attention is called in the library: ``attn_implementation="fastseq"``.
NAME = "fastseq"
#: Of the library. Tried: 4.57.1, 5.0.0 and 5.23.0; 4.53 and 4.50 lack what is needed.
OLDEST = "4.57"


def register() -> None:
    """Make ``attn_implementation="fastseq"`` known to transformers.

    It registers the attention function and the one that makes its masks: without the latter the
    library would make none, and causal models would look ahead. The masks are those that the
    library makes for torch's ``scaled_dot_product_attention``, boolean or, where plain causal
    attention does, none. A second call changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than 4.57.

    Example:
        >>> import fastseq.integrations.transformers
        >>> fastseq.integrations.transformers.register()
        >>> model = AutoModel.from_config(config, attn_implementation="fastseq")  # doctest: +SKIP
    """
    needs = f"fastseq.integrations.transformers: needs Hugging Face transformers {OLDEST} or newer"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{needs} (`pip install 'transformers>={OLDEST}'`): {error}") from error
    if _is_too_old(transformers.PreTrainedModel):
        raise ImportError(f"{needs}, got {transformers.__version__}")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _is_too_old(model: Any) -> bool:
    """Whether a class of models has no attention implementation that could be set."""
    return not hasattr(model, "_can_set_attn_implementation")


# --- the function --------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    r"""Attention as transformers' models call it.

    Args:
        module: the attention module; its ``is_causal`` holds where the argument is None.
        query: ``[B, H, Lq, D]``.
        key, value: ``[B, Hk, Lk, D]``, H a multiple of Hk; of a static cache with what is not
            filled yet behind.
        attention_mask: None, boolean ``[B, 1 or H, Lq, Lk]`` (True takes part), floating (added to
            the scores), or ``[B, Lk]`` for padding alone. It says all there is to say: with a mask,
            ``is_causal`` and ``sliding_window`` do not count. Without one, attention is causal if
            ``is_causal`` and there is more than one query; query i stands beside key i.
        dropout, scaling: as :func:`fastseq.functional.attention`.
        is_causal: overrides the module's.
        **kwargs: ``position_bias`` (added to the scores, differentiable), ``softcap``, ``s_aux``
            (sinks, ``[H]``), ``sliding_window`` (so many keys up to its own, where there is no
            mask), ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (packed sequences in a batch of one,
            where there is no mask), ``output_attentions`` (return the weights). What else models
            hand on says nothing about attention.

    Returns:
        ``[B, Lq, H, D]``, and the weights ``[B, H, Lq, Lk]`` or None.

    Raises:
        ValueError: a paged cache, or sinks that are not one for each head.
        TypeError: ``attention_mask`` is not a tensor.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            "fastseq: attention over a paged cache (continuous batching) is not served; "
            'use model.set_attn_implementation("sdpa") there'
        )
    sinks = _sinks(kwargs, query.shape[1])
    bias, mask = _bias_and_mask(attention_mask, kwargs.get("position_bias"), key.shape[2])
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    # Sizes are symbols to compilers and tensors to torch.jit.trace: neither is to be handed on.
    causal = attention_mask is None and is_causal and bool(query.shape[2] > 1)
    window = None
    if causal and kwargs.get("sliding_window") is not None:
        window = (int(kwargs["sliding_window"]) - 1, 0)
    options: dict[str, Any] = {
        "bias": bias,
        "mask": mask,
        "causal": causal,
        "window": window,
        "softcap": kwargs.get("softcap"),
        "sinks": sinks,
        "scale": scaling,
    }
    if query.shape[0] != key.shape[0]:  # learned queries have a batch of one
        query = query.expand(key.shape[0], -1, -1, -1)
    if kwargs.get("output_attentions"):
        return _with_weights(query, key, value, dropout, options)
    starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if None not in starts and attention_mask is None and bias is None and query.shape[0] == 1:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        options |= {"causal": is_causal, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
        output = _attention(query, key, value, dropout_p=dropout, **options)
        return output[None], None
    both = bias is not None and mask is not None
    if both or any(options[name] is not None for name in ("softcap", "sinks", "window")):
        output = _attention(query, key, value, dropout_p=dropout, **options)
    else:
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            mask if bias is None else bias,
            dropout,
            causal,
            scale=scaling,
            enable_gqa=bool(query.shape[1] != key.shape[1]),
        )
    return output.transpose(1, 2).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    output = functional.attention(query, key, value, **options)
    assert isinstance(output, Tensor)
    return output


def _sinks(kwargs: dict[str, Any], heads: int) -> Tensor | None:
    sinks = kwargs.get("s_aux")
    if kwargs.get("sinks") is not None or (sinks is not None and sinks.numel() != heads):
        raise ValueError(
            f"fastseq: attention sinks must be one for each of the {heads} heads (s_aux); "
            'use model.set_attn_implementation("eager") for those of each token'
        )
    return None if sinks is None else sinks.reshape(heads)


def _bias_and_mask(
    attention_mask: Tensor | None, position_bias: Tensor | None, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and what takes part."""
    if position_bias is not None:
        position_bias = position_bias[..., :keys]
    if attention_mask is None:
        return position_bias, None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"fastseq: attention_mask must be a tensor or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None].to(torch.bool)
    mask = attention_mask[..., :keys]
    if mask.dtype == torch.bool:
        return position_bias, mask
    if not mask.is_floating_point():
        return position_bias, mask.to(torch.bool)
    return mask if position_bias is None else position_bias + mask, None


def _with_weights(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """With the map in memory, as the library's eager attention returns it."""
    weights = functional.attention_weights(query, key, **options)
    assert isinstance(weights, Tensor)
    weights = F.dropout(weights, dropout) if dropout else weights
    output = weights.to(value.dtype) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return output.transpose(1, 2).contiguous(), weights


# --- the models ----------------------------------------------------------------------------------

#: Where a model keeps what its configurations said before :func:`set_attention`: pairs of a
#: configuration and its implementation. A copy or a pickle of the model has its own with it.
_BEFORE = "_fastseq_attention_before"
_LOOK_UP = "ALL_ATTENTION_FUNCTIONS"


def attention_modules(model: nn.Module) -> dict[nn.Module, tuple[nn.Module | None, str | None]]:
    """The attention modules of transformers' models inside a model.

    Returns:
        Of each its model (a ``PreTrainedModel``; None if there is none around it), and why its
        implementation cannot be set to ours, or None.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = name
    owners = {name: m for m, name in names.items() if isinstance(m, library.PreTrainedModel)}
    found: dict[nn.Module, tuple[nn.Module | None, str | None]] = {}
    for module, name in names.items():
        if _looks_up(module):
            owner = _around(name, owners)
            found[module] = owner, _refusal(module, owner)
    version = sys.modules["transformers"].__version__
    for module, name in names.items():
        if _computes_itself(module, found):
            reason = (
                f"computes attention by itself: transformers {version} leaves no choice of "
                f"implementation for {type(module).__name__}; a newer one may, or exclude it"
            )
            found[module] = _around(name, owners), reason
    return found


def _looks_up(module: nn.Module) -> bool:
    """Whether a module asks the library's table for its attention function."""
    forward: Any = getattr(type(module), "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and _LOOK_UP in code.co_names and hasattr(module, "config")


def _computes_itself(module: nn.Module, found: Iterable[nn.Module]) -> bool:
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.models.")
        and "Attention" in kind.__name__
        and module not in found
        and any(isinstance(child, nn.Linear) for child in module.children())
        and not any("Attention" in type(m).__name__ for m in module.modules() if m is not module)
    )


def _around(name: str, owners: dict[str, nn.Module]) -> nn.Module | None:
    """The innermost model around a module."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((owners[prefix] for prefix in prefixes if prefix in owners), None)


def _refusal(module: nn.Module, owner: Any) -> str | None:
    """Why accelerate leaves an attention module as it is, and what to do about it."""
    config: Any = module.config
    implementation = getattr(config, "_attn_implementation", None)
    if owner is None:
        return (
            "there is no PreTrainedModel around it, whose implementation could be set; "
            "accelerate the whole model"
        )
    if _is_too_old(type(owner)):
        version = sys.modules["transformers"].__version__
        return (
            f"transformers {version} is older than {OLDEST}: its attention implementation cannot "
            "be set; upgrade it, or leave attention to it"
        )
    if not owner._can_set_attn_implementation():
        return f"{type(owner).__name__} does not let its attention implementation be set"
    supports = ("sdpa", "flash_attn", "flex_attn", "attention_backend")
    if not any(getattr(owner, f"_supports_{name}", False) for name in supports):
        return f"{type(owner).__name__} supports no attention but its own eager one"
    if implementation not in (None, "eager", "sdpa", NAME):
        return (
            f"runs on {implementation!r}, which was asked for: "
            f'model.set_attn_implementation("{NAME}") after '
            "fastseq.integrations.transformers.register() changes that"
        )
    if getattr(config, "output_attentions", False) and implementation != NAME:
        return (
            "config.output_attentions keeps the library at eager; leave it False, and call the "
            "model with output_attentions=True where the weights are wanted"
        )
    return None


def runs_ours(module: nn.Module) -> bool:
    """Whether an attention module looks up our function."""
    return bool(getattr(module.config, "_attn_implementation", None) == NAME)


def shares_configuration(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    """Whether an attention module's implementation is set for one of these with it."""
    if not _looks_up(module):
        return False
    config: Any = module.config
    return any(_looks_up(other) and other.config is config for other in others)


def set_attention(model: nn.Module, chosen: Iterable[nn.Module]) -> None:
    """Set our attention for the configurations of these modules, which
    :func:`attention_modules` does not refuse; what they said before is kept for
    :func:`restore_attention`."""
    modules: list[Any] = [module for module in chosen if not runs_ours(module)]
    if not modules:
        return
    register()
    wanted = {id(module.config) for module in modules}
    theirs = [m for m in attention_modules(model) if hasattr(m, "config")]
    for root in _outermost(model):
        parts = set(root.modules())
        inside = [module for module in modules if module in parts]
        if not inside:
            continue
        before = [(config, config._attn_implementation) for config in _configs(root)]
        root.set_attn_implementation(NAME)
        for module in inside:  # some have a configuration that no model has
            module.config._attn_implementation_internal = NAME
        with_attention = {id(m.config) for m in theirs if m in parts}
        ours = wanted | {id(config) for config, was in before if was == NAME}
        whole = with_attention <= ours  # else what has no attention of its own stays, too
        for config, implementation in before:
            if id(config) not in wanted and (not whole or id(config) in with_attention):
                config._attn_implementation_internal = implementation
        changed = [pair for pair in before if pair[0]._attn_implementation != pair[1]]
        setattr(root, _BEFORE, [*getattr(root, _BEFORE, []), *changed])


def _outermost(model: nn.Module) -> list[Any]:
    """Transformers' models that are in no other of its models."""
    library = sys.modules["transformers.modeling_utils"]
    models = [m for m in model.modules() if isinstance(m, library.PreTrainedModel)]
    inner = {id(m) for outer in models for m in outer.modules() if m is not outer}
    return [m for m in models if id(m) not in inner]


def _configs(owner: Any) -> list[Any]:
    """Every configuration in a model, each once."""
    configs: dict[int, Any] = {}
    waiting = [m.config for m in owner.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) in configs or not hasattr(config, "_attn_implementation"):
            continue
        configs[id(config)] = config
        children = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        waiting += [child for child in children if child is not None]
    return list(configs.values())


def restore_attention(model: nn.Module) -> None:
    """Undo :func:`set_attention`; a model that was made with ours gets the library's choice."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    models = [m for m in model.modules() if isinstance(m, library.PreTrainedModel)]
    for owner in models:
        for config, implementation in reversed(vars(owner).pop(_BEFORE, ())):
            if config._attn_implementation == NAME:  # else somebody has set it since
                config._attn_implementation_internal = implementation
    for owner in models:
        if owner.config._attn_implementation == NAME:
            owner.set_attn_implementation(None)
