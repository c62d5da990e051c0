"""The Differentiable Neural Computer: an LSTM controller that reads and writes an external memory.

Graves et al., "Hybrid computing using a neural network with dynamic external memory", Nature 2016, with the details of
the authors' code (github.com/google-deepmind/dnc) where the two differ: strengths are softplus, not 1 + softplus; the
read modes stand in the order backward, forward, content; the past write weights that raise the usage are constants for
the gradient. This module knows nothing of tasks or of curvature; it only leaves `a_t` and `s_t` of its three linear
maps on a tape (`kfacrnn.kfac.capture`).

    B cases, N slots, W word size, R read heads, K write heads, H hidden units

The cost is the number of operations, not their size: what does not depend on the state is done for all steps at once,
outside the loop over time, and the ten maps of the interface are one matrix product. Where there is a C compiler, the
steps on a CPU are those of `kfacrnn.nn.dnc_kernel`: the same equations in a sixth of the time, but with no second
derivatives. KFACRNN_POINTWISE=torch does without it.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn.kfac.capture import LinearMap
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.dnc_kernel import Kernel, kernel_for

EPSILON = 1e-6


class State(NamedTuple):
    """What is carried from one step to the next; all zeros at the start of a sequence."""

    memory: Tensor  # M  [B, N, W]
    usage: Tensor  # u  [B, N]
    write_weights: Tensor  # ww [B, K, N]
    precedence: Tensor  # p  [B, K, N]
    link: Tensor  # L  [B, K, N, N]; L[i, j]: slot i was written just after slot j
    read_weights: Tensor  # wr [B, R, N]
    read_words: Tensor  # r  [B, R, W]
    hidden: Tensor  # h  [B, H]
    cell: Tensor  # c  [B, H]


class DNC(Capturable):
    """A one-layer DNC: `[T, B, inputs]` to logits `[T, B, outputs]`, from a zero state at every call.

    Computes in the dtype of its parameters even under autocast, because the memory accumulates. The controller's rows
    are in torch's gate order i, f, g, o; a constant 1, not a parameter, is added to f. Hidden state, cell and logits
    are clamped to ±`clip`. Raises ValueError for a size below 1, a clip not above 0 and an input of another shape.
    """

    forget_shift: Tensor
    off_diagonal: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 64,
        slots: int = 16,
        word: int = 16,
        read_heads: int = 4,
        write_heads: int = 1,
        clip: float = 20.0,
    ):
        super().__init__()
        H, N, W, R, K = hidden, slots, word, read_heads, write_heads
        sizes = (inputs, outputs, H, N, W, R, K)
        if min(sizes) < 1:
            raise ValueError(
                "inputs, outputs, hidden, slots, word, read_heads and write_heads must be at least 1, got "
                + ", ".join(map(str, sizes))
            )
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.inputs, self.hidden, self.slots, self.word = inputs, hidden, slots, word
        self.read_heads, self.write_heads, self.clip = read_heads, write_heads, clip
        self.interface_rows = {
            "write_vectors": K * W,
            "erase_vectors": K * W,
            "free_gate": R,
            "allocation_gate": K,
            "write_gate": K,
            "read_mode": R * (1 + 2 * K),  # of each head: backward, forward, content
            "write_keys": K * W,
            "write_strengths": K,
            "read_keys": R * W,
            "read_strengths": R,
        }
        self.controller_weight, self.controller_bias = _affine(inputs + R * W + H, 4 * H)
        self.interface_weight, self.interface_bias = _affine(H, sum(self.interface_rows.values()))
        self.output_weight, self.output_bias = _affine(H + R * W, outputs)
        self.register_buffer("forget_shift", torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(H), persistent=False)
        self.register_buffer("off_diagonal", 1 - torch.eye(N), persistent=False)
        self.reset_parameters()
        kernel_for(self.controller_weight.dtype, self.controller_weight.device)  # built now, in nobody's first step

    def reset_parameters(self) -> None:
        """Sonnet's defaults: weights normal with standard deviation 1/√fan_in, cut off at two of them; biases zero."""
        for weight in (self.controller_weight, self.interface_weight, self.output_weight):
            std = 1 / math.sqrt(weight.shape[1])
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        for bias in (self.controller_bias, self.interface_bias, self.output_bias):
            nn.init.zeros_(bias)

    def _build_maps(self) -> tuple[LinearMap, ...]:
        gates = dict.fromkeys("ifgo", self.hidden)
        return (
            LinearMap("controller", (self.controller_weight,), (self.controller_bias,), gates),
            LinearMap("interface", (self.interface_weight,), (self.interface_bias,), self.interface_rows),
            LinearMap("output", (self.output_weight,), (self.output_bias,), is_output=True),
        )

    def initial_state(self, cases: int) -> State:
        N, W, R, K, H = self.slots, self.word, self.read_heads, self.write_heads, self.hidden
        shapes = ((N, W), (N,), (K, N), (K, N), (K, N, N), (R, N), (R, W), (H,), (H,))
        return State(*(self.controller_weight.new_zeros(cases, *shape) for shape in shapes))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.inputs:
            raise ValueError(f"input must be [T, B, {self.inputs}], got {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x.to(self.controller_weight.dtype))

    def _forward(self, x: Tensor) -> Tensor:
        from_input, from_state = self.controller_weight.tensor_split([self.inputs], 1)
        # Added to a map's pre-activation at every step, so that its gradient is g_t: this is what goes on the tape.
        controller_drive = F.linear(x, from_input, self.controller_bias + self.forget_shift)
        interface_drive = self.interface_bias.expand(*x.shape[:2], -1)
        drives, weights = (controller_drive, interface_drive), (from_state, self.interface_weight)
        library = kernel_for(x.dtype, x.device)
        if library is None:
            rh = self._steps(drives, weights)
        else:
            sizes = self.hidden, self.slots, self.word, self.read_heads, self.write_heads
            rh, drives = Kernel(library, *sizes, self.clip).recurrence(drives, weights)

        r, h = rh.split([self.read_heads * self.word, self.hidden], 2)
        h_and_r = torch.cat([h, r], 2)[1:]
        y = F.linear(h_and_r, self.output_weight, self.output_bias)
        if self.tape is not None:
            controller, interface, output = self.maps()
            self.tape.record(controller, torch.cat([x, rh[:-1]], 2), drives[0])
            self.tape.record(interface, h[1:], drives[1])
            self.tape.record(output, h_and_r, y)
        return self._clamp(y)

    def _steps(self, drives: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
        """As `Kernel.recurrence`, in torch operations: read words and hidden states, `[T + 1, B, R·W + H]`."""
        states = [self.initial_state(drives[0].shape[1])]
        from_state, from_hidden = (weight.t() for weight in weights)
        for controller_drive, interface_drive in zip(*(drive.unbind(0) for drive in drives), strict=True):
            states.append(self.step(states[-1], (controller_drive, interface_drive), (from_state, from_hidden)))
        return torch.stack([torch.cat([state.read_words.flatten(1), state.hidden], 1) for state in states])

    def step(self, state: State, drives: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> State:
        """One time-step, a pure function of its arguments and of the sizes.

        `drives` are the parts of the controller's and the interface's pre-activations that do not depend on the state,
        `[B, 4H]` and `[B, interface]`; `weights` are what [r_{t-1}, h_{t-1}] and h_t are multiplied by from the right.
        """
        W, R, K = self.word, self.read_heads, self.write_heads
        (controller_drive, interface_drive), (controller_weight, interface_weight) = drives, weights
        recurrent = torch.cat([state.read_words.flatten(1), state.hidden], 1)
        hidden, cell = lstm_cell(torch.addmm(controller_drive, recurrent, controller_weight), state.cell)
        hidden, cell = self._clamp(hidden), self._clamp(cell)

        # The last axis is there to broadcast over slots or words. Neighbours that share an activation stay together.
        interface = torch.addmm(interface_drive, hidden, interface_weight).unsqueeze(2)
        write_vectors, gates, read_mode, write_keys, write_strengths, read_keys, read_strengths = interface.split(
            [K * W, K * W + R + 2 * K, R * (1 + 2 * K), K * W, K, R * W, R], 1
        )
        erase_vectors, free_gate, allocation_gate, write_gate = gates.sigmoid().split([K * W, R, K, K], 1)

        usage = updated_usage(state, free_gate)
        allocation = allocation_weights(usage, allocation_gate * write_gate)
        content = content_weights(state.memory, write_keys.view(-1, K, W), write_strengths)
        write_weights = write_gate * torch.lerp(content, allocation, allocation_gate)
        memory = written(state.memory, write_weights, erase_vectors.view(-1, K, 1, W), write_vectors.view(-1, K, W))
        link, precedence = updated_links(state, write_weights, self.off_diagonal)

        content = content_weights(memory, read_keys.view(-1, R, W), read_strengths)
        modes = read_mode.view(-1, R, 1 + 2 * K).softmax(2)
        read_weights = updated_read_weights(state, link, content, modes)
        read_words = torch.bmm(read_weights, memory)
        return State(memory, usage, write_weights, precedence, link, read_weights, read_words, hidden, cell)

    def _clamp(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, -self.clip, self.clip)  # as clamp, whose backward pass takes five operations


def _affine(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    cell = torch.addcmul(f.sigmoid() * cell, i.sigmoid(), g.tanh())
    return o.sigmoid() * cell.tanh(), cell


def content_weights(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """Softmax over the slots of softplus(strength) · cosine(key, word): `[B, heads, N]`. Uniform for a zero memory."""
    key_squares = (keys * keys).sum(2, keepdim=True) + EPSILON
    word_squares = (memory * memory).sum(2).unsqueeze(1) + EPSILON
    cosines = torch.bmm(keys, memory.mT) / (torch.sqrt(key_squares * word_squares) + EPSILON)
    return torch.softmax(F.softplus(strengths) * cosines, 2)


def updated_usage(state: State, free_gate: Tensor) -> Tensor:
    """Usage before this step's write: what the last write took, less what the read heads now free: `[B, N]`."""
    untouched = (1 - state.write_weights.detach()).prod(1)
    usage = torch.addcmul(1 - untouched, state.usage, untouched)
    retained = 1 - free_gate * state.read_weights
    return reduce(torch.mul, retained.unbind(1), usage)  # not prod: its backward pass is slow


def allocation_weights(usage: Tensor, claims: Tensor) -> Tensor:
    """Where to write by freedom alone, the freest slot first, the lower index on ties: `[B, K, N]`.

    `claims` `[B, K, 1]` is how much of its allocation each head will use; it counts as usage for the heads after it.
    """
    weights: list[Tensor] = []
    for head in range(claims.shape[1]):
        if weights:
            usage = usage + (1 - usage) * claims[:, head - 1] * weights[-1]
        free, order = ((1 - EPSILON) * (1 - usage)).sort(dim=1, descending=True, stable=True)
        log_used = torch.log(1 - free)
        all_before_used = torch.exp(log_used.cumsum(1) - log_used)  # not cumprod: its backward pass is slow
        weights.append(torch.zeros_like(free).scatter(1, order, free * all_before_used))
    return torch.stack(weights, 1)


def written(memory: Tensor, write_weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor) -> Tensor:
    kept = 1 - write_weights.unsqueeze(3) * erase_vectors
    return torch.baddbmm(reduce(torch.mul, kept.unbind(1), memory), write_weights.mT, write_vectors)


def updated_links(state: State, write_weights: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The link matrix and the precedence that the next step's links start from."""
    later, earlier = write_weights.unsqueeze(3), write_weights.unsqueeze(2)
    link = torch.addcmul((1 - later - earlier) * state.link, later, state.precedence.unsqueeze(2)) * off_diagonal
    precedence = torch.addcmul(write_weights, 1 - write_weights.sum(2, keepdim=True), state.precedence)
    return link, precedence


def updated_read_weights(state: State, link: Tensor, content: Tensor, modes: Tensor) -> Tensor:
    """Each read head moves backward or forward along every write head's links, or to the content: `[B, R, N]`."""
    K = link.shape[1]
    backward, forward, by_content = modes.unsqueeze(3).split([K, K, 1], 2)
    previous = state.read_weights.unsqueeze(2)
    # One product per direction sums over write heads and slots at once.
    weights = torch.baddbmm(by_content.squeeze(2) * content, (backward * previous).flatten(2), link.flatten(1, 2))
    return torch.baddbmm(weights, (forward * previous).flatten(2), link.mT.flatten(1, 2))
