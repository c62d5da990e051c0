"""The products that every update pays for, P_Gᵀ Z P_A and P_G Z P_Aᵀ, in few calls and at the processor's rate.

Z `[Σm, n]` holds the rows of several splits, each with a P_G of its own, one below the other; P_A is theirs together. A
matrix of one dimension is diagonal. Which formulas need the products, `kfacrnn.kfac.fisher` says.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfacrnn.kfac.aligned import product

_SMALL = 192  # rows of splits


def together(splits: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Splits of one size as a stack, small ones as one block-diagonal matrix, diagonals as one: fewer products."""
    several = tuple(splits)
    kinds, shapes = {P.dim() for P in several}, {P.shape for P in several}
    if len(several) == 1 or len(kinds) > 1:
        return several
    if kinds == {1}:
        return (torch.cat(several),)
    if len(shapes) == 1:
        return (torch.stack(several),)
    return (torch.block_diag(*several),) if sum(map(len, several)) <= _SMALL else several


def rows(P: Tensor) -> int:
    """Of the splits that P stands for."""
    return P.shape[0] * P.shape[1] if P.dim() == 3 else P.shape[0]


def _columns(P: Tensor) -> int:
    return rows(_transpose(P))


def into(P_G: tuple[Tensor, ...], Z: Tensor, P_A: Tensor) -> Tensor:
    """P_Gᵀ Z P_A, every split's rows by its own P_G. Where P_A keeps a few modes, that leaves little for P_G to do."""
    return _by_G(tuple(map(_transpose, P_G)), _by_A(Z, P_A))


def back(P_G: tuple[Tensor, ...], Z: Tensor, P_A: Tensor) -> Tensor:
    """P_G Z P_Aᵀ, for the same reason in the other order."""
    return _by_A(_by_G(P_G, Z), _transpose(P_A))


def _by_G(P_G: tuple[Tensor, ...], Z: Tensor) -> Tensor:
    if len(P_G) == 1:
        return _by_split(P_G[0], Z)
    return torch.cat([_by_split(P, z) for P, z in zip(P_G, Z.split([_columns(P) for P in P_G]), strict=True)])


def _by_split(P: Tensor, Z: Tensor) -> Tensor:
    if P.dim() == 1:
        return P[:, None] * Z
    Z = Z.to(P.dtype)
    return product(P, Z) if P.dim() == 2 else product(P, Z.unflatten(0, (len(P), -1))).flatten(0, 1)


def _by_A(Z: Tensor, P_A: Tensor) -> Tensor:
    """A product of matrices is in the dtype of P."""
    return Z * P_A if P_A.dim() == 1 else product(Z.to(P_A.dtype), P_A)


def _transpose(P: Tensor) -> Tensor:
    return P if P.dim() == 1 else P.mT
