"""From a model and its predictions to the averages of every Fisher block.

The estimator finds the maps, gives each a block, and for a statistics pass samples targets from the model's own
predictive distribution, so that the averages estimate the Fisher and not the empirical Fisher (section 2.2). It knows
nothing of inverses or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfacrnn.kfac import randomness
from kfacrnn.kfac.block import Block, Curvature
from kfacrnn.kfac.capture import Recorder, Tap, Tape
from kfacrnn.kfac.coverage import Coverage, Row
from kfacrnn.kfac.factors import Sequences
from kfacrnn.kfac.findings import Finding, beyond_the_end, first_not_finite, incomplete
from kfacrnn.kfac.layout import Pass, require_lengths, seen_by
from kfacrnn.kfac.maths import DecompositionError
from kfacrnn.kfac.partition import partition
from kfacrnn.kfac.processes import Alone
from kfacrnn.predictive import Distribution


class Estimator:
    """Blocks for the trained maps of `model`, by name, and the passes that feed them.

    `trained` are the parameters that an optimiser moves; those that no map holds are `uncovered`. Raises ValueError for
    parameters that two maps share, but for an embedding's weight that is a linear map's, too, that are not the
    model's, or are neither float32 nor float64, and for maps trained in part.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: set[Tensor],
        curvature: Curvature,
        *,
        decay: float,
        seed: int,
        processes: Alone | None = None,
    ):
        if not trained:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        self._recorder = Recorder(model, trained)
        self._decay = decay
        self._empirical = curvature.empirical
        self._processes = processes or Alone()
        self.blocks, self.uncovered = partition(model, self._recorder, trained, curvature)
        self._processes.place(self.blocks)
        self._names = {id(block.map): name for name, block in self.blocks.items()}
        self._parameter = next(p for p in model.parameters() if p in trained)
        self._frozen: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if not p.requires_grad}
        self._generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a state may go to another device
        self.skipped = 0  # passes that were left out because they were not finite

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def moving(self) -> dict[str, Block]:
        """The blocks that have inverses, and parameters of their own to move."""
        return {name: block for name, block in self.blocks.items() if block.moves}

    def update(self, forward: Callable[[], Any]) -> bool:
        """One statistics pass, see `KFAC.update_statistics`; False if it was not finite and therefore left out."""
        is_first = not any(block.average.weight for block in self.blocks.values())
        eager = torch.compiler.set_stance("force_eager")
        with torch.enable_grad(), self.private_randomness(), eager, self._recorder.recording() as tape:
            returned = forward()
            tape.closed = True
            with self._full_precision():
                distribution, targets = self._targets(returned)
                loss = distribution.log_loss(targets).sum()
                taps = self._taps_of_blocks(tape)
                self._require_graph(loss, taps)
                whole = self._parameter_gradients(loss) if is_first else []
                sources = [*(tap.s for uses in taps.values() for tap in uses), distribution.logits]
                *gradients, logits_gradient = torch.autograd.grad(loss, sources, allow_unused=True)
        with torch.no_grad(), self._full_precision():
            passes = self._passes(taps, gradients, distribution)
            for block, _ in whole:
                block.meet_logits(passes[block.name].g, logits_gradient)
            all_saw = Finding.of_all(self._processes.gathered(self._finding(passes, whole)))
            if (name := all_saw.not_finite) is not None:
                if is_first:
                    raise DecompositionError(f"{name} met values that are not finite in the first statistics pass")
                self.skipped += 1
                return False
            if all_saw.incomplete is not None:
                raise ValueError(all_saw.incomplete)
            self._observe(passes, distribution, all_saw)
        return True

    def _targets(self, returned: Any) -> tuple[Distribution, Tensor]:
        if isinstance(returned, tuple) != self._empirical or isinstance(returned, Tensor):
            wanted = "(distribution, targets) with" if self._empirical else "the distribution alone without"
            raise ValueError(f"forward must return {wanted} fisher='empirical', got {type(returned).__name__}")
        distribution, *given = returned if self._empirical else (returned,)
        if not all(hasattr(distribution, name) for name in ("log_loss", "sample", "batch_first")):
            raise ValueError(
                f"forward returned a {type(distribution).__name__}: its distribution is to be one of "
                "kfacrnn.predictive, such as Categorical(logits=…)"
            )
        part = self._processes.part(distribution.logits.shape[1])
        if not self._empirical:  # a distribution of the user's own may know nothing of parts
            return distribution, distribution.sample(self._sampler(), *(() if part is None else (part,)))
        (targets,) = given
        return distribution, targets.transpose(0, 1) if distribution.batch_first else targets

    def _sampler(self) -> torch.Generator:
        """The private generator, or one that it has seeded, where the predictions are."""
        if self.device.type == "cpu":
            return self._generator
        return torch.Generator(self.device).manual_seed(self._seed())

    def _seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self._generator, device="cpu"))

    def _full_precision(self) -> torch.autocast:
        """Autocast is for the forward pass; a backward pass follows what that one did, where it was off included."""
        return torch.autocast(self.device.type, enabled=False)

    @contextmanager
    def private_randomness(self) -> Iterator[None]:
        """Dropout in a pass for K-FAC's own use draws from the private generator, not from the training run's."""
        restore = randomness.kept(self.device)
        try:
            randomness.seed(self._seed() + self._processes.rank, self.device)  # each process has noise of its own
            yield
        finally:
            restore()

    def _taps_of_blocks(self, tape: Tape) -> dict[str, list[Tap]]:
        """In the order in which the maps were used: once for all time-steps, or at each of them."""
        taps: dict[str, list[Tap]] = {}
        for tap in tape:
            name = self._names.get(id(tap.map))
            if name is not None:
                taps.setdefault(name, []).append(tap)
        unused = sorted(set(self.blocks) - set(taps))
        if unused:
            raise ValueError(f"never used in the forward pass: {', '.join(unused)}; freeze what is not trained")
        return taps

    def _require_graph(self, loss: Tensor, taps: dict[str, list[Tap]]) -> None:
        for name, uses in taps.items():
            if not all(p.requires_grad for p in self.blocks[name].parameters):
                raise ValueError(f"{name} was frozen after the optimiser was made: make a new one")
            if not all(tap.s.requires_grad for tap in uses):
                raise ValueError(f"{name} ran under no_grad, or in torch.utils.checkpoint without use_reentrant=False")
        if not loss.requires_grad:
            raise ValueError("the predictions have no gradient: forward must not detach them, nor run under no_grad")

    def _parameter_gradients(self, loss: Tensor) -> list[tuple[Block, list[Tensor]]]:
        blocks = self.moving.values()
        parameters = [p for block in blocks for p in block.parameters]
        if not parameters:
            return []
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rest = iter(found)
        return [(block, block.own_rows([next(rest) for _ in block.parameters])) for block in blocks]

    def _passes(
        self, taps: dict[str, list[Tap]], gradients: Sequence[Tensor | None], distribution: Distribution
    ) -> dict[str, Pass]:
        """In the parameters' dtype, whatever autocast has made of a and g."""
        passes, sequences, rest = {}, Sequences.of(distribution), iter(gradients)
        if sequences.steps == sequences.cases > 1:
            self._require_one_layout(distribution, taps)
        lengths = [sequences.steps] * sequences.cases if distribution.lengths is None else distribution.lengths.tolist()
        for name, uses in taps.items():
            if (packed := uses[0].lengths) is not None:
                require_lengths(name, packed, lengths)
            seen = seen_by(name, uses, [next(rest) for _ in uses], distribution.batch_first, sequences)
            dtype = self.blocks[name].parameters[0].dtype
            a = seen.a.to(dtype) if seen.a.is_floating_point() else seen.a
            passes[name] = Pass(a, seen.g.to(dtype), seen.sequences)
        return passes

    def _require_one_layout(self, distribution: Distribution, taps: dict[str, list[Tap]]) -> None:
        """Where T = B, shapes do not tell which axis is time, and lag products along the other would be wrong."""
        packed = {tap.map for uses in taps.values() for tap in uses if tap.lengths is not None}
        if (name := self._recorder.other_layout(distribution.batch_first, packed)) is not None:
            layouts = ("time first", "batch first")[:: -1 if distribution.batch_first else 1]
            raise ValueError(
                f"the predictions are {layouts[0]}, {name or 'the model'} is {layouts[1]}, and as T = B, shapes do not "
                "tell what other maps are: if they are as that layer is, say so in the predictive distribution, "
                f"batch_first={not distribution.batch_first}; if not, take more or fewer sequences"
            )

    def _finding(self, passes: dict[str, Pass], whole: list[tuple[Block, list[Tensor]]]) -> Finding:
        is_idle = self._processes.is_idle
        sequences = {name: seen.sequences.counted(0 if is_idle else 1) for name, seen in passes.items()}
        logits = {name for name, block in self.blocks.items() if block.is_logits}
        not_finite = None if is_idle else first_not_finite(passes)
        complaints: list[str | None] = []
        if not_finite is None:
            complaints += [beyond_the_end(passes)]
            complaints += [incomplete(block, passes, gradients) for block, gradients in whole]
        return Finding(sequences, logits, not_finite, next(filter(None, complaints), None))

    def _observe(self, passes: dict[str, Pass], distribution: Distribution, all_saw: Finding) -> None:
        for name, block in self.blocks.items():
            block.is_logits = name in all_saw.logits
            block.begin(all_saw.sequences[name], self._decay)
        with self._processes.summing(list(self.blocks.values())):
            for name, (a, g, sequences) in ({} if self._processes.is_idle else passes).items():
                block, everyones = self.blocks[name], all_saw.sequences[name]
                variance = distribution.output_variance() if block.is_logits and not self._empirical else None
                block.observe(a, g, variance, replace(everyones, padding=sequences.padding))

    def coverage(self) -> Coverage:
        rows = [row for block in self.blocks.values() for row in block.coverage()]
        return Coverage([*rows, *(Row("—", name, "gradient", "") for name in self.uncovered)])

    def state_dict(self) -> dict[str, Any]:
        inverses = self._processes.whole({name: block.inverse for name, block in self.blocks.items()})
        blocks = {name: block.state_dict(inverses[name]) for name, block in self.blocks.items()}
        return {"blocks": blocks, "generator": self._generator.get_state(), "skipped": self.skipped}

    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raises ValueError unless `load_state_dict` can load it."""
        odd = sorted(set(state["blocks"]) ^ set(self.blocks))
        if odd:
            raise ValueError(f"the state is that of another model: {odd[0]} is in one of them only")
        for name, block in self.blocks.items():
            block.require_fitting(state["blocks"][name])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        for name, block in self.blocks.items():
            block.load_state_dict(state["blocks"][name])
            block.inverse = self._processes.kept(name, block.inverse)
        self._generator.set_state(state["generator"].cpu())

    def require_frozen(self, parameters: Iterable[Tensor]) -> None:
        """Raises ValueError if one of them is trained now and was not when blocks were found."""
        for parameter in parameters:
            if parameter.requires_grad and parameter in self._frozen:
                raise ValueError(f"{self._frozen[parameter]} was unfrozen after the optimiser was made: make a new one")
