"""The DNC's recurrence on a CPU, forward and backward: two matrix products and two calls of `dnc.c` a step.

The same equations as the plain steps of `kfacrnn.nn.dnc`, one of which takes some two hundred operations of torch and
as many again backward. The gradient is exact, derived by hand, and cannot be differentiated again.

    rh  [T, B, R·W + H]: the words read and the hidden state, side by side
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kfacrnn.nn import compiler

SOURCE = Path(__file__).with_name("dnc.c")
# Longer vectors than a usual word of 16 numbers fills would be slower.
FLAGS = ("-mprefer-vector-width=256",) if platform.machine() == "x86_64" else ()
REALS = {torch.float32: "float", torch.float64: "double"}


class _Sizes(ctypes.Structure):
    """`Sizes` of dnc.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("cases", "hidden", "slots", "word", "read_heads", "write_heads", "threads")
    )


def kernel_for(dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """`dnc.c` for tensors of this kind, if they are float32 or float64 on a CPU and there is a C compiler. None inside
    torch.compile, which cannot look into it."""
    if device.type != "cpu" or dtype not in REALS or torch.compiler.is_compiling():
        return None
    library = compiler.load(SOURCE, *FLAGS, f"-Dreal={REALS[dtype]}")
    if library is not None and library.record_size.argtypes is None:
        _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    sizes, pointer, number, clip = ctypes.POINTER(_Sizes), ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    signatures = {
        "controller_forward": [sizes, clip, *[pointer] * 5, number],
        "controller_backward": [sizes, clip, *[pointer] * 5, number, pointer, pointer],
        "memory_forward": [sizes, *[pointer] * 4, number],
        "memory_backward": [sizes, *[pointer] * 3, number, pointer, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.record_size.argtypes, library.record_size.restype = [sizes], number


class Kernel(NamedTuple):
    """`dnc.c` for a dtype, and the sizes of a model."""

    code: ctypes.CDLL
    hidden: int
    slots: int
    word: int
    read_heads: int
    write_heads: int
    clip: float

    def recurrence(
        self, drives: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """rh of a zero state and of all T steps from it, `[T + 1, B, R·W + H]`, and the tensors whose gradient is g_t.

        `drives` are the parts of the controller's and the interface's pre-activations that do not depend on the state,
        `[T, B, 4H]` and `[T, B, interface]`; `weights` are what [r_{t-1}, h_{t-1}] and h_t are multiplied by,
        `[4H, R·W + H]` and `[interface, H]`.
        """
        (steps, cases), width = drives[0].shape[:2], weights[0].shape[1]
        rh = drives[0].new_empty(steps + 1, cases, width)
        rh[0] = 0
        controller = _Products.apply(drives[0], weights[0], rh[:-1])
        interface = _Products.apply(drives[1], weights[1], rh[1:, :, -self.hidden :])
        constants = (weight.detach() for weight in weights)
        return _Recurrence.apply(self, rh, controller, interface, *constants), (controller, interface)

    def sizes(self, cases: int) -> _Sizes:
        sizes = self.hidden, self.slots, self.word, self.read_heads, self.write_heads
        return _Sizes(cases, *sizes, torch.get_num_threads())


class _Products(torch.autograd.Function):
    """A drive, to which the recurrence adds W a_t: its gradient is g_t, and that of W is Σ g_t a_tᵀ, one product.

    Apart from the recurrence, so that a backward pass that is asked for g_t alone does without that product.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        ctx.a = a  # which the recurrence has yet to fill: a saved tensor may be copied, or sent away, at once
        return drive.view_as(drive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, g.flatten(0, 1).t() @ ctx.a.flatten(0, 1), None


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, rh: Tensor, *drives_and_weights: Tensor) -> Tensor:
        """Fills and returns `rh`, whose first row is the start."""
        controller_drive, interface_drive, controller_weight, interface_weight = drives_and_weights
        (T, B), H, lib, sizes = controller_drive.shape[:2], kernel.hidden, kernel.code, kernel.sizes(rh.shape[1])
        kept = T if any(ctx.needs_input_grad) else 1  # steps to be remembered
        gates, tanh_cells = rh.new_empty(kept, B, 4 * H), rh.new_empty(kept, B, H)
        cells, records = rh.new_empty(kept + 1, B, H), rh.new_empty(kept + 1, B, lib.record_size(sizes))
        cells[0], records[0] = 0, 0
        interface = rh.new_empty(B, interface_weight.shape[0])

        from_rh, from_hidden, hidden = controller_weight.t(), interface_weight.t(), rh[..., -H:]
        at_gates, at_tanh_cells, at_cells, at_records, at_rh, at_hidden = map(
            _addresses, (gates, tanh_cells, cells, records, rh, hidden)
        )
        for t in range(T):
            now, then, next = t % kept, t % (kept + 1), (t + 1) % (kept + 1)
            torch.addmm(controller_drive[t], rh[t], from_rh, out=gates[now])
            lib.controller_forward(
                sizes,
                kernel.clip,
                at_cells[then],
                at_gates[now],
                at_cells[next],
                at_tanh_cells[now],
                at_hidden[t + 1],
                rh.stride(1),
            )
            torch.addmm(interface_drive[t], hidden[t + 1], from_hidden, out=interface)
            lib.memory_forward(
                sizes, interface.data_ptr(), at_records[then], at_records[next], at_rh[t + 1], rh.stride(1)
            )
        if kept == T:
            ctx.kernel = kernel
            ctx.save_for_backward(controller_weight, interface_weight, gates, cells, tanh_cells, records)
        return rh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rh_gradient: Tensor) -> tuple[Tensor | None, ...]:
        controller_weight, interface_weight, gates, cells, tanh_cells, records = ctx.saved_tensors
        kernel, (T, B, H) = ctx.kernel, tanh_cells.shape
        lib, sizes = kernel.code, kernel.sizes(B)
        controller_g, interface_g = torch.empty_like(gates), gates.new_empty(T, B, interface_weight.shape[0])
        cell_gradient, record_gradient = torch.zeros_like(cells[0]), torch.zeros_like(records[0])
        gradient = rh_gradient[T].clone(memory_format=torch.contiguous_format)  # of rh[t], from all later steps
        hidden_gradient = gradient[:, -H:]

        at_gates, at_tanh_cells, at_cells, at_records, at_controller_g, at_interface_g = map(
            _addresses, (gates, tanh_cells, cells, records, controller_g, interface_g)
        )
        at_gradient, at_hidden_gradient, stride = gradient.data_ptr(), hidden_gradient.data_ptr(), gradient.stride(0)
        at_cell_gradient, at_record_gradient = cell_gradient.data_ptr(), record_gradient.data_ptr()
        for t in reversed(range(T)):
            lib.memory_backward(
                sizes, at_records[t], at_records[t + 1], at_gradient, stride, at_record_gradient, at_interface_g[t]
            )
            hidden_gradient.addmm_(interface_g[t], interface_weight)
            lib.controller_backward(
                sizes,
                kernel.clip,
                at_cells[t],
                at_gates[t],
                at_cells[t + 1],
                at_tanh_cells[t],
                at_hidden_gradient,
                stride,
                at_cell_gradient,
                at_controller_g[t],
            )
            if t:
                torch.addmm(rh_gradient[t], controller_g[t], controller_weight, out=gradient)
        return None, None, controller_g, interface_g, None, None


def _addresses(tensor: Tensor) -> list[int]:
    """Of tensor[0], tensor[1], …"""
    start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return [start + step * index for index in range(tensor.shape[0])]
