"""Are the first updates still what they were when the stored results were made?

Here no number is right or wrong. If one has changed, so have training curves, and results that are stored are no longer
those of the code: raise `NUMERICS_VERSION` in kfacrnn/run.py, or the version of the one optimiser, and mend this.
"""

from __future__ import annotations

import pytest

from kfacrnn import config, discovery
from kfacrnn.session import Session
from tests.synthetic import TINY

UPDATES = 25  # K-FAC has renewed its inverses at its steady pace by then
LOSSES = {
    "adam": 4.071784,
    "adamw": 4.071823,
    "kfac_indep": 1.08209,
    "kfac_option1": 0.988892,
    "kfac_option2": 0.972391,
    "muon": 4.055403,
    "psgd_kron": 4.139048,
    "rmsprop": 3.815787,
    "sgd": 3.866136,
    "shampoo": 4.028485,
    "soap": 4.073584,
}
"""Of validation, nats per sequence, where chance is 1.39. Rates are as shipped, for longer runs."""
KFAC = [
    "optimizer.kl_clip=1e-3",  # so that another processor's rounding does not show
    "optimizer.statistics_every=5",
    "optimizer.statistics_decay=0.95",
    "optimizer.refresh_every=20",
]


@pytest.mark.parametrize("optimizer", discovery.modules("optimizers"))
def test_the_first_updates_are_what_they_were(optimizer: str) -> None:
    if missing := discovery.missing("optimizers", optimizer):
        pytest.skip(f"needs {missing}")
    settings = KFAC if optimizer.startswith("kfac") else []
    session = Session(config.compose([*TINY, f"optimizer={optimizer}", "task.batch_size=8", *settings]))
    for _ in range(UPDATES):
        session.step()
    assert session.evaluate("valid") == pytest.approx(LOSSES[optimizer], rel=1e-4)
