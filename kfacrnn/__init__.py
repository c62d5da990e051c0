"""K-FAC for recurrent networks: Martens, Ba & Johnson, "Kronecker-factored Curvature Approximations for Recurrent
Neural Networks", ICLR 2018, as a PyTorch optimiser and as a reproduction of the paper's experiments.

Importing this package needs torch only; the experiment framework is the extra `kfacrnn[experiments]`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfacrnn.kfac.optimizer import KFAC as KFAC

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # KFAC needs torch, which takes seconds to import: the command line answers without it.
    if name == "KFAC":
        from kfacrnn.kfac.optimizer import KFAC

        return KFAC
    raise AttributeError(f"module 'kfacrnn' has no attribute '{name}'")
