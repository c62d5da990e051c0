"""K-FAC with a general transition, in the limit of long sequences (eqn 9)."""

from __future__ import annotations

from functools import partial

from kfacrnn.optimizers import _kfac

Config = _kfac.Config
build = partial(_kfac.build, "option2")
