"""What the fork server of `tests.processes` imports: a framework that has composed a run and trained none."""

import torch._dynamo  # otherwise imported with the first optimiser of a process, in seconds

from kfacrnn import config, launch, tasks, train

config.compose([])

__all__ = ["config", "launch", "tasks", "torch", "train"]
