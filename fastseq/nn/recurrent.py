"""LSTM, GRU, RNN and their cells as drop-in modules, and LayerNorm-LSTM and -GRU.

``torch.compile`` refuses every ``torch.nn.LSTM``, ``GRU`` and ``RNN``, subclasses too, unless
``torch._dynamo.config.allow_rnn = True``; with it, ours become one op a layer and direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from .. import functional

Input = Tensor | PackedSequence


def _weights(module: RNNBase) -> list[Tensor]:
    """The module's parameters as they are now (replaced, parametrized or functional ones too)."""
    return [getattr(module, name) for name in module._flat_weights_names]


def _options(module: RNNBase) -> tuple[Any, ...]:
    """What torch's functions take behind the parameters."""
    return (
        module.bias,
        module.num_layers,
        module.dropout,
        module.training,
        module.bidirectional,
        module.batch_first,
    )


class _Scriptable:
    """``torch.jit.script`` compiles the torch class in our place, with the same parameters.

    Our forward chooses kernels in Python, which TorchScript cannot read; a script is meant to run
    where fastseq may not be, too. torch leaves what it compiled in the model that it was given: to
    go on with ours there, script a copy.
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        theirs: Any = next(c for c in type(self).__mro__ if c.__module__ == RNNBase.__module__)
        twin: torch.nn.Module = theirs.__new__(theirs)
        twin.__dict__.update(self.__dict__)
        return twin


class LSTM(_Scriptable, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on our kernels; see :func:`fastseq.functional.lstm`.

    ``forward(input, hx=None, lengths=None)``: with int64 ``lengths [B]`` the input is padded, and
    need not be packed: the output is 0 past a row's length.
    """

    def forward(  # type: ignore[override]
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Input, tuple[Tensor, Tensor]]:
        output, h_n, c_n = functional.lstm(
            input, hx, _weights(self), *_options(self), lengths=lengths
        )
        return output, (h_n, c_n)


class GRU(_Scriptable, torch.nn.GRU):
    """:class:`torch.nn.GRU` on our kernels; see :func:`fastseq.functional.gru`.

    ``forward(input, hx=None, lengths=None)``, as :class:`LSTM`.
    """

    def forward(  # type: ignore[override]
        self, input: Input, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Input, Tensor]:
        output, h_n = functional.gru(input, hx, _weights(self), *_options(self), lengths=lengths)
        return output, h_n


class RNN(_Scriptable, torch.nn.RNN):
    """:class:`torch.nn.RNN` on our kernels; see :func:`fastseq.functional.rnn`.

    ``forward(input, hx=None, lengths=None)``, as :class:`LSTM`.
    """

    def forward(  # type: ignore[override]
        self, input: Input, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Input, Tensor]:
        kind = "tanh" if self.mode == "RNN_TANH" else "relu"
        output, h_n = functional.rnn(
            input, hx, _weights(self), *_options(self), nonlinearity=kind, lengths=lengths
        )
        return output, h_n


class LSTMCell(_Scriptable, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on our kernels; see :func:`fastseq.functional.lstm_cell`."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, states = _cell_input("LSTMCell", self, input, hx)
        h, c = functional.lstm_cell(rows, (states[0], states[-1]), *_cell_weights(self))
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Scriptable, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` on our kernels; see :func:`fastseq.functional.gru_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        rows, states = _cell_input("GRUCell", self, input, None if hx is None else (hx,))
        h = functional.gru_cell(rows, states[0], *_cell_weights(self))
        return h if input.dim() == 2 else h.squeeze(0)


class RNNCell(_Scriptable, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on our kernels; see :func:`fastseq.functional.rnn_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        rows, states = _cell_input("RNNCell", self, input, None if hx is None else (hx,))
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        h = functional.rnn_cell(
            rows, states[0], *_cell_weights(self), nonlinearity=self.nonlinearity
        )
        return h if input.dim() == 2 else h.squeeze(0)


def _cell_weights(cell: torch.nn.RNNCellBase) -> tuple[Any, ...]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def _cell_input(
    name: str, cell: torch.nn.RNNCellBase, input: Tensor, hx: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input and states as batches.

    Raises:
        ValueError: a dimension too few or too many, as torch's cells.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: input must have 1 or 2 dimensions, got {input.dim()}")
    for i, state in enumerate(hx or ()):
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: hx[{i}] must have 1 or 2 dimensions, got {state.dim()}")
    rows = input if input.dim() == 2 else input.unsqueeze(0)
    if hx is None:
        return rows, (input.new_zeros(rows.shape[0], cell.hidden_size),)
    return rows, tuple(state if input.dim() == 2 else state.unsqueeze(0) for state in hx)


# --- with layer norm -----------------------------------------------------------------------------


class _LayerNormRNN(RNNBase):
    """Parameters, initialisation and options of the two modules below."""

    _norm_names: tuple[str, ...]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__} has no TorchScript: torch has no such layer to put in its "
            "place; use torch.export or torch.jit.trace"
        )

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        gates = {"LSTM": 4, "GRU": 3}[mode] * hidden_size
        names = []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                for name in self._norm_names:
                    full = f"{name}_l{layer}{suffix}"
                    size = hidden_size if name.startswith("ln_c") else gates
                    start = torch.zeros if name == "ln_c_bias" else torch.ones
                    parameter = torch.nn.Parameter(start(size, device=device, dtype=dtype))
                    self.register_parameter(full, parameter)
                    names.append(full)
        self._norm_parameters = names

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in getattr(self, "_norm_parameters", ()):
            parameter = getattr(self, name)
            torch.nn.init.constant_(parameter, 0.0 if name.startswith("ln_c_bias") else 1.0)

    def _extras(self, lengths: Tensor | None) -> dict[str, Any]:
        return {
            "lengths": lengths,
            "layer_norm": [getattr(self, name) for name in self._norm_parameters],
            "eps": self.eps,
            "zoneout": self.zoneout,
            "recurrent_dropout": self.recurrent_dropout,
            "weight_dropout": self.weight_dropout,
        }

    def extra_repr(self) -> str:
        more = [
            f"{name}={getattr(self, name)}"
            for name in ("zoneout", "recurrent_dropout", "weight_dropout")
            if getattr(self, name)
        ]
        return ", ".join([super().extra_repr(), *more])


class LayerNormLSTM(_LayerNormRNN):
    """An LSTM with layer norm of the input's gates, the hidden gates and the cell.

    Parameters are those of :class:`torch.nn.LSTM` and for each layer and direction the gains
    ``ln_ih_l0`` and ``ln_hh_l0 [4H]``, and gain and bias of the cell's norm, ``ln_c_l0`` and
    ``ln_c_bias_l0 [H]``. Gains start at 1.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as :class:`torch.nn.LSTM`.
        eps, zoneout, recurrent_dropout, weight_dropout: see :func:`fastseq.functional.lstm`.

    Shape:
        ``(input, hx=None, lengths=None) -> (output, (h_n, c_n))`` as :class:`LSTM`.
    """

    _norm_names = ("ln_ih", "ln_hh", "ln_c", "ln_c_bias")

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any) -> None:
        super().__init__("LSTM", input_size, hidden_size, *args, **options)

    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Input, tuple[Tensor, Tensor]]:
        output, h_n, c_n = functional.lstm(
            input, hx, _weights(self), *_options(self), **self._extras(lengths)
        )
        return output, (h_n, c_n)


class LayerNormGRU(_LayerNormRNN):
    """A GRU with layer norm of the input's gates and the hidden gates.

    Parameters are those of :class:`torch.nn.GRU` and for each layer and direction the gains
    ``ln_ih_l0`` and ``ln_hh_l0 [3H]``, which start at 1. Arguments as :class:`LayerNormLSTM`.

    Shape:
        ``(input, hx=None, lengths=None) -> (output, h_n)`` as :class:`GRU`.
    """

    _norm_names = ("ln_ih", "ln_hh")

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any) -> None:
        super().__init__("GRU", input_size, hidden_size, *args, **options)

    def forward(
        self, input: Input, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Input, Tensor]:
        output, h_n = functional.gru(
            input, hx, _weights(self), *_options(self), **self._extras(lengths)
        )
        return output, h_n
