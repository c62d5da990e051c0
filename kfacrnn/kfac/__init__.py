"""The library: Kronecker factors, Fisher inverses and the optimiser. Knows nothing of experiments."""

from kfacrnn.kfac.fisher import fisher_inverse
from kfacrnn.kfac.maths import eta

__all__ = ["eta", "fisher_inverse"]
