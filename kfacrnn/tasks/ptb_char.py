"""Characters of the Penn Treebank, split and spelt as by Mikolov et al. (2012), for figure 2 of the paper."""

from __future__ import annotations

import torch

from kfacrnn.data import ptb
from kfacrnn.tasks import DataSource
from kfacrnn.tasks._language_model import Config, LanguageModelTask

__all__ = ["Config", "build"]


class PTBChar(LanguageModelTask):
    unit = "character"
    metric = "bits per character"


def build(config: Config, *, seed: int, device: torch.device, data: DataSource) -> PTBChar:
    return PTBChar(config, ptb.load("char", root=data.root, source=data.source), device)
