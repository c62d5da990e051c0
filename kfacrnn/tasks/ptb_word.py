"""Words of the Penn Treebank: the model and set-up of Zaremba et al. (2014), for figures 1 and 4 of the paper."""

from __future__ import annotations

import torch

from kfacrnn.data import ptb
from kfacrnn.tasks import DataSource
from kfacrnn.tasks._language_model import Config, LanguageModelTask

__all__ = ["Config", "build"]


class PTBWord(LanguageModelTask):
    unit = "word"
    metric = "perplexity"


def build(config: Config, *, seed: int, device: torch.device, data: DataSource) -> PTBWord:
    return PTBWord(config, ptb.load("word", root=data.root, source=data.source), device)
