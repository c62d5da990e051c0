"""How often curvature is renewed: rarely in the long run, often while the model is young."""

from __future__ import annotations


def is_due(update: int, newest: int, every: int) -> bool:
    """Whether curvature last renewed before update `newest` (-1: never) is to be renewed before `update`: at multiples
    of `every`, and whenever a quarter of the updates made so far, or `every` of them, have passed.

    The first updates change a model most. A new language model predicts all words alike and learns within ten updates
    how often each comes, which multiplies the curvature of the common ones by hundreds: inverses that are ten updates
    old would then overshoot.
    """
    return newest < update and (update % every == 0 or update - newest >= min(every, max(1, newest // 4)))
