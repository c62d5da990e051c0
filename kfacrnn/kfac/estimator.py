"""From a model and its predictions to the averages of every Fisher block.

The estimator finds the maps, gives each a block, and for a statistics pass samples targets from the model's own
predictive distribution, so that the averages estimate the Fisher and not the empirical Fisher (section 2.2). It knows
nothing of inverses or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfacrnn.kfac.blocks import Block, Curvature, block_of
from kfacrnn.kfac.capture import Recorder, Tap, Tape
from kfacrnn.kfac.factors import Sequences
from kfacrnn.predictive import Distribution


class Estimator:
    """Blocks for the trained maps of `model`, by name, and the passes that feed them.

    `trained` are the parameters that an optimiser moves; those that no map holds are `uncovered`. Raises ValueError for
    parameters that two maps share and for maps trained in part.
    """

    def __init__(
        self, model: nn.Module, trained: set[Tensor], curvature: Curvature, *, decay: float, empirical: bool, seed: int
    ):
        self._recorder = Recorder(model)
        self._decay = decay
        self._empirical = empirical
        self.blocks, self.uncovered = _partition(model, self._recorder, trained, curvature)
        self._names = {id(block.map): name for name, block in self.blocks.items()}
        self._generator = torch.Generator(next(iter(trained)).device).manual_seed(seed)

    def update(self, forward: Callable[[], Any]) -> None:
        """One statistics pass; see `KFAC.update_statistics`."""
        with torch.enable_grad(), self._private_randomness(), torch.compiler.set_stance("force_eager"):
            with self._recorder.recording() as tape:
                returned = forward()
            distribution, targets = self._targets(returned)
            loss = distribution.log_loss(targets).sum()
            taps = self._one_tap_per_block(tape)
            sources = [tap.s for tap in taps.values()]
            *gradients, logits_gradient = torch.autograd.grad(loss, [*sources, distribution.logits], allow_unused=True)
        sequences = Sequences.of(distribution)
        with torch.no_grad():
            for (name, tap), g in zip(taps.items(), gradients, strict=True):
                if g is None:
                    raise ValueError(f"{name} was used, but the predictions do not depend on it")
                self._observe(self.blocks[name], tap, g, logits_gradient, distribution, sequences)

    def _targets(self, returned: Any) -> tuple[Distribution, Tensor]:
        if not self._empirical:
            return returned, returned.sample(self._generator)
        distribution, targets = returned
        return distribution, targets.transpose(0, 1) if distribution.batch_first else targets

    @contextmanager
    def _private_randomness(self) -> Iterator[None]:
        """Dropout in a statistics pass draws from the private generator, not from the training run's."""
        device = self._generator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator, device=device)))
            yield

    def _one_tap_per_block(self, tape: Tape) -> dict[str, Tap]:
        taps: dict[str, Tap] = {}
        for tap in tape:
            name = self._names.get(id(tap.map))
            if name in taps:
                raise ValueError(f"{name} was used more than once in one forward pass: call it once for all time-steps")
            if name is not None:
                taps[name] = tap
        unused = sorted(set(self.blocks) - set(taps))
        if unused:
            raise ValueError(f"never used in the forward pass: {', '.join(unused)}; freeze what is not trained")
        return taps

    def _observe(
        self,
        block: Block,
        tap: Tap,
        g: Tensor,
        logits_gradient: Tensor,
        distribution: Distribution,
        sequences: Sequences,
    ) -> None:
        a, g, sequences = time_first(block.name, tap, g, distribution, sequences)
        if block.average.weight == 0:
            block.meet_logits(g, logits_gradient)
        variance = distribution.output_variance() if block.is_logits and not self._empirical else None
        dtype = block.parameters[0].dtype
        block.observe(a if a.dtype == torch.int64 else a.to(dtype), g.to(dtype), variance, sequences, self._decay)

    def state_dict(self) -> dict[str, Any]:
        blocks = {name: block.state_dict() for name, block in self.blocks.items()}
        return {"blocks": blocks, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        odd = sorted(set(state["blocks"]) ^ set(self.blocks))
        if odd:
            raise ValueError(f"the state is that of another model: {odd[0]} is in one of them only")
        for name, block in self.blocks.items():
            block.load_state_dict(state["blocks"][name])
        self._generator.set_state(state["generator"].cpu())


def _partition(
    model: nn.Module, recorder: Recorder, trained: set[Tensor], curvature: Curvature
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    """A block for every trained map, and the trained parameters that no map holds, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    blocks: dict[str, Block] = {}
    owner: dict[Tensor, str] = {}
    for name, map in recorder.maps.items():
        frozen = [names[p] for p in map.parameters if p not in trained]
        if len(frozen) == len(map.parameters):
            continue
        if frozen:
            raise ValueError(f"{name} is trained only in part, {frozen[0]} is not: train all of it or none")
        for parameter in map.parameters:
            if parameter in owner:
                raise ValueError(
                    f"{names[parameter]} is shared by {owner[parameter]} and {name}: tied weights have no single "
                    "Kronecker-factored block; untie them"
                )
            owner[parameter] = name
        blocks[name] = block_of(name, map, curvature, names)
    return blocks, {names[p]: p for p in names if p in trained and p not in owner}


def time_first(
    name: str, tap: Tap, g: Tensor, distribution: Distribution, sequences: Sequences
) -> tuple[Tensor, Tensor, Sequences]:
    """a `[T, B, …]` and g `[T, B, out]` of a tap, and the time axis that goes with them: T = 1 for a map that is used
    once per sequence. Raises ValueError for a layout that hides the time axis: lag products of folded data would be
    silently wrong."""
    a, steps, cases = tap.a, sequences.steps, sequences.cases
    lead = tuple(g.shape[:-1])
    if tap.time_first is None and lead == (cases,):
        return a.unsqueeze(0), g.unsqueeze(0), sequences.once()
    if tap.time_first is None and distribution.batch_first and len(lead) == 2:
        a, g, lead = a.transpose(0, 1), g.transpose(0, 1), lead[::-1]
    if lead == (steps, cases):
        return a, g, sequences
    if lead == (steps * cases,):
        raise ValueError(f"{name} was given time and batch folded into one axis of {lead[0]}: give it [T, B, …]")
    raise ValueError(
        f"{name} was given leading axes {list(lead)}, but the predictions have T = {steps} and B = {cases}; a model "
        "whose batch comes first says so in its predictive distribution: batch_first=True"
    )
