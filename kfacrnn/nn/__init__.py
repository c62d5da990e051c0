"""Recurrent layers whose linear maps can be captured: drop-ins for `torch.nn`."""
