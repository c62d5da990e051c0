"""The library: Kronecker factors, Fisher inverses and the optimiser. Knows nothing of experiments."""

from kfacrnn.kfac.maths import eta
from kfacrnn.kfac.standalone import fisher_inverse

__all__ = ["eta", "fisher_inverse"]
