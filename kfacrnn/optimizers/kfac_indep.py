"""K-FAC without correlation over time (eqn 6)."""

from __future__ import annotations

from functools import partial

from kfacrnn.optimizers import _kfac

Config = _kfac.Config
build = partial(_kfac.build, "indep")
