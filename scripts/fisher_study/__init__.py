"""How far the Fisher approximations are from the exact Fisher: the parts of `scripts/fisher_distance.py`."""
