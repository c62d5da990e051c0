"""The library: Kronecker factors, Fisher inverses and the optimiser. Knows nothing of experiments."""

from kfacrnn.kfac.damping import LevenbergMarquardt
from kfacrnn.kfac.maths import eta
from kfacrnn.kfac.quadratic import QuadraticModel
from kfacrnn.kfac.standalone import fisher_inverse

__all__ = ["LevenbergMarquardt", "QuadraticModel", "eta", "fisher_inverse"]
