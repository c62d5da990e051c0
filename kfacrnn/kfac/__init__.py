"""The library: Kronecker factors, Fisher inverses and the optimiser. Knows nothing of experiments."""
