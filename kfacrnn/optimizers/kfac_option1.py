"""K-FAC with a symmetric transition between steps (eqn 8)."""

from __future__ import annotations

from functools import partial

from kfacrnn.optimizers import _kfac

Config = _kfac.Config
build = partial(_kfac.build, "option1")
