"""What a Fisher block knows of its curvature, whatever form its factors have.

A block belongs to one map of the model: it takes the map's a_t and g_t into its averages, turns the averages into an
inverse, and its parameters' gradients into a direction.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacrnn.kfac import precision
from kfacrnn.kfac.capture import LinearMap, Map
from kfacrnn.kfac.coverage import Row
from kfacrnn.kfac.factors import Average, Sequences
from kfacrnn.kfac.fisher import Diagnostics, FisherInverse, from_state
from kfacrnn.kfac.inversion import Inversion
from kfacrnn.kfac.layout import Pass


@dataclass(frozen=True)
class Curvature:
    """What all blocks agree on: the approximation, the largest factor that is kept dense, in which precision its
    decomposition and products are, and which modes count. None, and products with float64 factors: see
    `kfacrnn.kfac.precision`. Of targets that are not the model's own, `empirical`, the g_t of outputs are correlated
    over time. With `joint_gates` the splits of a map are one block."""

    approximation: str
    max_dense: int
    gamma_max: float
    compute_dtype: torch.dtype | None = None
    product_dtype: torch.dtype | None = None
    lag_tolerance: float | None = None
    empirical: bool = False
    joint_gates: bool = False

    def exactness(self, lag_0: Sequence[Tensor]) -> dict[str, Any]:
        """What `inversion` is to be told of precision and tolerance, for a map with these A0 and G0."""
        A0, *G0 = lag_0
        widest = max((len(M) for M in lag_0 if M.dim() == 2), default=0)
        weights = len(A0) * sum(map(len, G0))
        compute_dtype = self.compute_dtype or precision.compute_dtype(A0.dtype, widest)
        product_dtype = self.product_dtype if A0.dtype == torch.float32 else None
        product_dtype = product_dtype or precision.product_dtype(A0.dtype, weights, A0.device)
        tolerance = self.lag_tolerance
        tolerance = precision.lag_tolerance(A0.dtype, weights) if tolerance is None else tolerance
        return {"compute_dtype": compute_dtype, "product_dtype": product_dtype, "lag_tolerance": tolerance}


def plain(inverse: Any) -> Any:
    """An inverse as tensors in plain containers, for a checkpoint."""
    return inverse.state() if isinstance(inverse, FisherInverse) else inverse


class Block(ABC):
    """One map's parameters, averages and inverse. The first statistics pass settles whether the map is the model's
    last: `is_output`, it feeds nothing but the predictions; `is_logits`, its output is their logits."""

    inverse: Any = None
    is_logits = False
    moves = True  # False: its parameters are another block's to move, and it has no inverse of its own

    def __init__(self, name: str, map: Map, curvature: Curvature, names: Mapping[Tensor, str]):
        self.name = name
        self.map = map
        self.curvature = curvature
        self.parameters = map.parameters
        self.parameter_names = [names[p] for p in self.parameters]
        self.average = Average()

    @property
    def is_output(self) -> bool:
        return self.is_logits or (isinstance(self.map, LinearMap) and self.map.is_output)

    def begin(self, sequences: Sequences, decay: float) -> None:
        """Makes room in the averages for a pass on these sequences."""
        self.average.begin(sequences, decay, self._shapes(), like=self.parameters[0])

    @abstractmethod
    def observe(self, a: Tensor, g: Tensor, variance: Tensor | None, sequences: Sequences) -> None:
        """Adds what a pass, or a process's part of it, saw. `sequences` are those of the whole pass, but for their
        padding; `variance` is E[g²], exactly, if the map's output is the logits."""

    @abstractmethod
    def gradients_of(self, a: Tensor, g: Tensor) -> list[Tensor]:
        """The gradient that a_t and g_t add up to, of the map's rows of every parameter."""

    def whole_gradients_of(self, passes: Mapping[str, Pass]) -> list[Tensor]:
        """The same from all that `passes` saw of the parameters."""
        a, g, _ = passes[self.name]
        return self.gradients_of(a, g)

    @property
    @abstractmethod
    def costs(self) -> list[int]:
        """Of decomposing A and every split's G, in units of the cube of their rows."""

    @abstractmethod
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """The sums of the averages: those that are symmetric or diagonal, and those that are neither."""

    def meet_logits(self, g: Tensor, logits_gradient: Tensor) -> None:
        """A map whose output has the gradient of the logits computes the logits."""
        if isinstance(self.map, LinearMap) and g.shape == logits_gradient.shape:
            difference = (g - logits_gradient).abs().max()
            self.is_logits = bool(difference <= 0.01 * logits_gradient.abs().max())  # bf16 rounds by less

    @abstractmethod
    def inversion(self, damping: float) -> Inversion:
        """The work of inverting the present averages; may be done later, in another thread or process."""

    @abstractmethod
    def direction(self, loss_scale: float) -> tuple[list[Tensor], Tensor]:
        """Δ = N·F⁻¹∇h, the map's rows of every parameter, and Δᵀ∇h."""

    @abstractmethod
    def coverage(self) -> list[Row]: ...

    @abstractmethod
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the averages."""

    @property
    def diagnostics(self) -> Diagnostics | None:
        return getattr(self.inverse, "diagnostics", None)

    def has_gradients(self) -> bool:
        """Raises ValueError where some of the parameters have one and others have not."""
        missing = [name for name, p in zip(self.parameter_names, self.parameters, strict=True) if p.grad is None]
        if 0 < len(missing) < len(self.parameters):
            raise ValueError(f"{missing[0]} has no gradient and others of {self.name} have: its block moves as one")
        return not missing

    def gradients(self) -> list[Tensor]:
        return self.own_rows([p.grad for p in self.parameters if p.grad is not None])

    def own_rows(self, like_parameters: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors shaped as the parameters are, the rows that the map consists of."""
        return [tensor[self.map.rows] for tensor in like_parameters]

    def state_dict(self, inverse: Any) -> dict[str, Any]:
        """With this inverse, which may be one that other processes hold."""
        return {
            "average": self.average.state_dict(),
            "inverse": plain(inverse),
            "is_logits": self.is_logits,
        }

    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raises ValueError unless `load_state_dict` can load it."""
        shapes = [tuple(total.shape) for total in state["average"]["sums"]]
        after = copy.copy(self)
        after.is_logits = state["is_logits"]
        if shapes and shapes != after._shapes():
            raise ValueError(
                f"the state is that of another model or other gates: {self.name} has factors {shapes} there"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.is_logits = state["is_logits"]
        self.average.load_state_dict(state["average"], self.parameters[0].device)
        self.inverse = self.restored(state["inverse"])

    def restored(self, inverse: Any) -> Any:
        """The inverse that `plain` made into plain containers, on the parameters' device."""
        device = self.parameters[0].device
        if isinstance(inverse, list):
            return [tensor.to(device) for tensor in inverse]
        return None if inverse is None else from_state(inverse).to(device)
