"""K-FAC for recurrent networks: Martens, Ba & Johnson, "Kronecker-factored Curvature Approximations for Recurrent
Neural Networks", ICLR 2018, as a PyTorch optimiser and as a reproduction of the paper's experiments.

Importing this package needs torch only; the experiment framework is the extra `kfacrnn[experiments]`.
"""

__version__ = "0.1.0"
