"""ONNX Runtime's LSTM, GRU and RNN as rivals of ours, where ``onnxruntime`` and ``onnx`` are there.

One node, inference alone: the graph is written by hand around the problem's weights, which the
runtime packs when it loads them. That is what a user has who exports a trained model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.backends import BackendError

from ..registry import Provider

_NODES = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN"}
#: Where each of ONNX's gates stands among torch's: i, o, f, c and z, r, h.
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "tanh": (0,)}


def rivals() -> tuple[Provider, ...]:
    """The provider ``onnxruntime``, or nobody."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return ()
    assert onnx
    assert onnxruntime
    return (Provider("onnxruntime", _once, setup=lambda _: _OnnxRuntime()),)


def _once(**given: Any) -> dict[str, Tensor]:
    return _OnnxRuntime()(**given)


class _OnnxRuntime:
    """The operator's function; a session for each number of threads, made when it is called."""

    def __init__(self) -> None:
        self.sessions: dict[int, Any] = {}

    def __call__(self, *, kind: str, input: Tensor, **rest: Any) -> dict[str, Tensor]:
        self._check(kind, input, rest)
        threads = torch.get_num_threads()
        if threads not in self.sessions:
            self.sessions[threads] = _session(kind, input, rest, threads)
        # Time first, which a single row is already.
        feed = {"x": input.transpose(0, 1).numpy()}
        feed |= {
            name: rest[name].transpose(0, 1).numpy() for name in ("h_0", "c_0") if name in rest
        }
        output, *final = self.sessions[threads].run(None, feed)
        found = {"output": torch.from_numpy(output)[:, 0].transpose(0, 1)}
        for name, state in zip(("h_n", "c_n"), final, strict=False):
            found[name] = torch.from_numpy(state).transpose(0, 1)
        return found

    @staticmethod
    def _check(kind: str, input: Tensor, rest: dict[str, Any]) -> None:
        reason = None
        if kind not in _NODES or input.dtype != torch.float32 or not input.is_cpu:
            reason = "one node of fp32 on the CPU"
        elif torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in (input, *rest.values())
        ):
            reason = "inference alone"
        elif rest["layers"] > 1 or rest["bidirectional"]:
            reason = "one layer in one direction"
        elif rest.get("lengths") is not None or any(
            n.startswith(("ln", "weight_hr")) for n in rest
        ):
            reason = "no lengths, layer norm or projection"
        if reason is not None:
            raise BackendError(f"onnxruntime: cannot serve: {reason}")


def _session(kind: str, input: Tensor, rest: dict[str, Any], threads: int) -> Any:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    batch, steps, features = input.shape
    hidden = rest["weight_hh_0"].shape[1]

    def by_gates(name: str) -> Any:
        parts = rest[name].detach().chunk(len(_ORDER[kind]))
        return torch.cat([parts[i] for i in _ORDER[kind]]).numpy()[None]

    weights = {"w": by_gates("weight_ih_0"), "r": by_gates("weight_hh_0")}
    if rest.get("bias_ih_0") is not None:
        weights["b"] = np.concatenate([by_gates("bias_ih_0"), by_gates("bias_hh_0")], -1)
    states = ["h_0", "c_0"] if kind == "lstm" else ["h_0"]
    given = [name if name in rest else "" for name in states]
    node = helper.make_node(
        _NODES[kind],
        ["x", "w", "r", "b" if "b" in weights else "", "", *given],
        ["y", "h_n", "c_n"][: 1 + len(states)],
        hidden_size=hidden,
        **({"linear_before_reset": 1} if kind == "gru" else {}),
    )

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state = (1, batch, hidden)
    graph = helper.make_graph(
        [node],
        "layer",
        [value("x", steps, batch, features), *(value(name, *state) for name in given if name)],
        [
            value("y", steps, 1, batch, hidden),
            *(value(n, *state) for n in ("h_n", "c_n")[: len(states)]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in weights.items()],
    )
    # An opset and a version of the format that runtimes of some years read.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
