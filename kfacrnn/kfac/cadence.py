"""How often curvature is renewed: rarely in the long run, often while the model is young."""

from __future__ import annotations

EARLY_INTERVAL = 1 / 16


def is_due(update: int, newest: int, every: int, early_interval: float) -> bool:
    """Whether curvature last renewed before update `newest` (-1: never) is to be renewed before `update`: at multiples
    of `every`, and whenever `every` updates have passed or, if that is sooner, `early_interval` times as many as had
    been made before the last renewal.

    The first updates change a model most. A new language model predicts all words alike and learns within ten updates
    how often each comes, which multiplies the curvature of the common ones by hundreds: inverses that are ten updates
    old would then overshoot.
    """
    interval = min(every, max(1, int(early_interval * newest)))
    return newest < update and (update % every == 0 or update - newest >= interval)
