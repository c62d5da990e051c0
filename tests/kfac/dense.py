"""The oracle: eqns 6, 8 and 9 evaluated literally on dense Kronecker products. Nothing is shared with the product.

`vec` stacks columns, V0 = A0 ⊗ G0 is damped, Ψ̂ is whitened with symmetric roots, eqn 8 is a sum over lags. Float64 is
good for about 1e-10 where the spectrum of Ψ̂ stays away from ±1; nearer than that (the sum over lags then spans T² and
F̂ is to be inverted) `digits` evaluates the same expressions in mpmath, which is for matrices of a few rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import torch

Array = np.ndarray[Any, Any]  # of float64, or of mpmath numbers


def matrix(M: torch.Tensor, digits: int | None = None) -> Array:
    """As a dense matrix, a 1-D diagonal expanded."""
    array = M.double().numpy()
    array = np.diag(array) if array.ndim == 1 else array
    return array if digits is None else np.vectorize(mpmath.mpf, otypes=[object])(array)


def inverse(M: Array) -> Array:
    if M.dtype == object:
        return np.array(mpmath.inverse(mpmath.matrix(M.tolist())).tolist(), dtype=object)
    return np.linalg.inv(M)


def inverse_root(M: Array) -> Array:
    if M.dtype == object:
        values, vectors = mpmath.eigsy(mpmath.matrix(M.tolist()))
        Q = np.array(vectors.tolist(), dtype=object)
        return Q @ np.diag([1 / mpmath.sqrt(value) for value in values]) @ Q.T
    values, vectors = np.linalg.eigh(M)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def damped_factors(A0: Array, G0: Array, damping: float, pi: float | None = None) -> tuple[Array, Array]:
    if pi is None:
        mean_A, mean_G = np.trace(A0) / len(A0), np.trace(G0) / len(G0)
        pi = (mean_A / mean_G) ** 0.5 if mean_A > 0 and mean_G > 0 else 1.0
    root = A0.flat[0] * 0 + damping  # in the arithmetic of the factors
    root = root**0.5
    return A0 + pi * root * np.eye(len(A0)), G0 + root / pi * np.eye(len(G0))


def inner_inverse(approximation: str, Psi: Array, lengths: Mapping[int, float]) -> Array:
    """F̂⁻¹ from Ψ̂ = Ψ̂_A ⊗ Ψ̂_G; the weights of `lengths` sum to 1."""
    identity = np.eye(len(Psi))
    expected_length = sum(weight * T for T, weight in lengths.items())
    if approximation == "indep":
        return identity / expected_length
    if approximation == "option2":
        return (identity - Psi) @ inverse(identity - Psi.T @ Psi) @ (identity - Psi.T) / expected_length
    F, power = expected_length * identity, identity
    for d in range(1, max(lengths)):
        power = power @ Psi
        F = F + sum(weight * max(T - d, 0) for T, weight in lengths.items()) * (power + power.T)
    return inverse(F)


def multiply(
    approximation: str,
    A0: torch.Tensor,
    A1: torch.Tensor,
    G0: torch.Tensor,
    G1: torch.Tensor,
    Z: torch.Tensor,
    *,
    lengths: Mapping[int, float],
    damping: float = 0.0,
    pi: float | None = None,
    digits: int | None = None,
) -> torch.Tensor:
    """F⁻¹ vec(Z) as a matrix; `pi` overrides the balance of the damping."""
    with mpmath.workdps(digits or 15):
        lag_A, lag_G = matrix(A1, digits), matrix(G1, digits)
        if approximation == "option1":
            lag_A, lag_G = (lag_A + lag_A.T) / 2, (lag_G + lag_G.T) / 2
        damped_A, damped_G = damped_factors(matrix(A0, digits), matrix(G0, digits), damping, pi)
        root = inverse_root(np.kron(damped_A, damped_G))
        Psi = root @ np.kron(lag_A, lag_G) @ root
        F_inverse = root @ inner_inverse(approximation, Psi, lengths) @ root
        z = F_inverse @ matrix(Z).reshape(-1, order="F")
        return torch.from_numpy(z.astype(float).reshape(Z.shape, order="F").copy())
