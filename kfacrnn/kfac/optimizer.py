"""K-FAC for recurrent networks as a `torch.optim.Optimizer`.

    every k updates    statistics    forward on some sequences, sampled targets, backward to the pre-activations
    every r updates    inverses      A0, A1, G0, G1 → F⁻¹ by eqn 6, 8 or 9; both more often at first
    every update       direction     Δ = N·F⁻¹∇h
                       step size     η = s·min(lr, √(kl_clip / Δᵀ∇h)), s the factor of the learning-rate schedule; what
                                     is bounded is the KL change of −ηΔ, before momentum
                       momentum      v ← μv − ηΔ,  θ ← θ + v;  η and μ may come from `kfacrnn.kfac.quadratic` instead

Where this is not meant to be used: a loss that is no log-likelihood (there is no Fisher), batches of a few dozen
time-steps in all (the factors are noise), and layers that are used at some of the time-steps only, or out of their
order (their time axis cannot be seen; what can be told apart is refused).

J. Martens, J. Ba, M. Johnson, "Kronecker-factored Curvature Approximations for Recurrent Neural Networks", ICLR 2018.
J. Ba, R. Grosse, J. Martens, "Distributed Second-Order Optimization using Kronecker-Factored Approximations", ICLR 2017
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kfacrnn.kfac.arguments import (
    Positive,
    check_covered,
    check_forward,
    check_group,
    check_positive,
    check_settings,
    plain_numbers,
)
from kfacrnn.kfac.block import Curvature
from kfacrnn.kfac.cadence import EARLY_INTERVAL, Passes
from kfacrnn.kfac.coverage import Coverage
from kfacrnn.kfac.damping import Damping, LevenbergMarquardt
from kfacrnn.kfac.estimator import Estimator
from kfacrnn.kfac.inverses import Inverses
from kfacrnn.kfac.maths import GAMMA_MAX
from kfacrnn.kfac.processes import processes
from kfacrnn.kfac.quadratic import (
    STAY,
    Chosen,
    QuadraticModel,
    common_schedule_factor,
    plane,
    repeatable,
    require_repeatable,
)
from kfacrnn.kfac.step_size import Bounded
from kfacrnn.kfac.update import Directions, Taken, move, preconditioned, predicted_change, running, steps
from kfacrnn.predictive import Distribution


class KFAC(torch.optim.Optimizer):
    """Preconditions the gradient with a Kronecker-factored Fisher that models correlation over time.

    model           any composition of `kfacrnn.nn` layers, `nn.Linear`, `nn.Embedding` and `nn.LayerNorm`
    approximation   "indep" (eqn 6), "option1" (eqn 8), "option2" (eqn 9)
    loss_scale      N = (loss summed over a sequence's steps) / (training loss h): T for a mean over steps, 1 for a sum;
                    may be set at any time, as T may change
    lr              η_max, the largest step size. A learning-rate scheduler acts on the whole step: when it has brought
                    lr to s times its first value, η is s times what it would be, whichever bound is the closer one
    damping         λ, added to V0 in factored form
    first_damping   λ before the first update; ×0.7 with every update until it is `damping`; None: no more
    kl_clip         c: the predicted KL change of −ηΔ, an update without its momentum, is at most c/2, in nats per unit
                    of h (s²·c/2 by schedule); a momentum of μ makes of equal steps one that is 1/(1 − μ) as long
    momentum        μ, on the preconditioned updates
    weight_decay    decoupled, multiplied by the step size taken
    statistics_every, statistics_fraction, statistics_decay
                    k updates between statistics passes, fewer at first; share of the sequences in a pass, see
                    `statistics_cases`; decay of the averages per pass
    refresh_every, refresh_delay
                    r updates between inverses, fewer at first; 0: at once, d: in the background, in use d updates later
    early_interval  updates between passes and between inverses at first, as a share of those made before; in (0, 1]
    fisher          "sampled": targets drawn from the model; "empirical": those of the data, which `forward` returns too
    fallback        None: parameters outside every block are an error; "gradient": they follow the plain gradient
    adaptive_damping
                    a `LevenbergMarquardt`, or None for a damping that only the caller changes; see `adapt_damping`
    quadratic_model
                    a `QuadraticModel`: η and μ are, at every update, where M(δ) with the exact Fisher is least; `step`
                    needs `forward`. lr, kl_clip and momentum do not act, but a schedule's s scales the whole update
    params          parameter groups as for any optimiser, to give parts of the model their own lr, momentum or weight
                    decay; default: every parameter. What is frozen now has to stay so
    gates           "separate": gates are blocks of their own, as in section 4; "joint": those that one map computes are
                    one block, whose G has their correlations, and so are the parts of the DNC's interface, unless it
                    were larger than max_dense. An LSTM's one G costs sixteen times as much to decompose as its four
    max_dense       factors of a larger dimension are diagonal
    gamma_max       bound on γ and on 1/(1 − m_G m_A), see `fisher_inverse`
    compute_dtype, product_dtype
                    of decompositions, torch.float32 or torch.float64, and of the products with what they give,
                    torch.float32 or torch.bfloat16; None: by size and processor, see `kfacrnn.kfac.precision`. Inputs
                    whose mean is several times their deviation want float32 products
    lag_tolerance   modes with |ψ̂| no larger count as uncorrelated over time; 0: exact, None: by size, see there
    seed            of the private generator that targets are sampled with
    process_group   of a data-parallel run, such as `torch.distributed.group.WORLD`; see `kfacrnn.kfac.processes`
    inverse_share   largest share of its ranks that hold any one inverse: 1 exchanges inverses, 1/ranks directions

    Raises ValueError for an argument out of range, and for a model of which something would be left untrained.
    Blocks without gradients (None) stay where they are, as with any optimiser.
    """

    kl_clip = Positive("c, which may be set at any time.")
    loss_scale = Positive("N, which may be set at any time.")

    def __init__(
        self,
        model: nn.Module,
        approximation: str = "option2",
        *,
        loss_scale: float,
        lr: float = 0.3,
        damping: float = 3e-4,
        first_damping: float | None = None,
        kl_clip: float = 4e-2,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        statistics_every: int = 10,
        statistics_fraction: float = 1 / 8,
        statistics_decay: float = 0.9,
        refresh_every: int = 20,
        refresh_delay: int = 0,
        early_interval: float = EARLY_INTERVAL,
        fisher: str = "sampled",
        fallback: str | None = None,
        adaptive_damping: LevenbergMarquardt | None = None,
        quadratic_model: QuadraticModel | None = None,
        params: Iterable[Any] | None = None,
        gates: str = "separate",
        max_dense: int = 4096,
        gamma_max: float = GAMMA_MAX,
        compute_dtype: torch.dtype | None = None,
        product_dtype: torch.dtype | None = None,
        lag_tolerance: float | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        inverse_share: float = 1.0,
    ):
        check_settings(
            model=model, approximation=approximation, fisher=fisher, fallback=fallback, damping=damping,
            first_damping=first_damping, gamma_max=gamma_max, statistics_fraction=statistics_fraction,
            inverse_share=inverse_share, statistics_decay=statistics_decay, statistics_every=statistics_every,
            refresh_every=refresh_every, gates=gates, max_dense=max_dense, refresh_delay=refresh_delay,
            early_interval=early_interval, compute_dtype=compute_dtype, product_dtype=product_dtype,
            lag_tolerance=lag_tolerance,
        )  # fmt: skip
        params = model.parameters() if params is None else params
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.approximation = approximation
        self._damping = Damping(damping, first_damping, adaptive_damping)
        self.kl_clip = kl_clip
        self.quadratic_model = quadratic_model
        self.loss_scale = loss_scale
        self._passes = Passes(statistics_every, statistics_fraction, early_interval)
        self._processes = processes(process_group, inverse_share)
        self._estimator = Estimator(
            model,
            {p for group in self.param_groups for p in group["params"] if p.requires_grad},
            Curvature(
                approximation,
                max_dense,
                gamma_max,
                compute_dtype,
                product_dtype,
                lag_tolerance,
                empirical=fisher == "empirical",
                joint_gates=gates == "joint",
            ),
            decay=float(statistics_decay),
            seed=seed,
            processes=self._processes,
        )
        check_covered(self._estimator.uncovered, fallback)
        self._inverses = Inverses(self._estimator.moving, refresh_every, refresh_delay, self._processes, early_interval)
        self._updates = self._skipped = self._adapted_at = 0
        self._last = Taken()
        self._velocity_curvature = 0.0  # vᵀ(F + λ_h I)v, as far as the quadratic model is asked
        self._reduction_ratio = math.nan
        self._is_repeatable = False  # the quadratic model's forward, as far as is known

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor may: blocks are found once. Raises ValueError later, and for an option out of range."""
        if hasattr(self, "_estimator"):
            raise ValueError("param groups of KFAC are given once, as params: its blocks are found when it is made")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        group["first_lr"] = float(group["lr"])  # a scheduler changes lr; what it has made of this one is s

    # ------------------------------------------------------------------------------------------------- statistics

    @property
    def statistics_due(self) -> bool:
        """Whether `update_statistics` should be called before the next step."""
        return self._passes.is_due(self._updates)

    def statistics_cases(self, cases: int) -> slice:
        """The next `statistics_fraction` of a batch's `cases` sequences, in rotation over the passes. Where it leaves a
        rest, the last part of a rotation overlaps the one before. A rank gives and gets the numbers of its own ones."""
        return self._processes.own(self._passes.next_cases(cases * self._processes.ranks))

    def update_statistics(self, forward: Callable[[], Any]) -> None:
        """Takes a_t and g_t of one forward pass into the averages.

        `forward` runs the model and returns its predictive distribution, such as
        `lambda: Categorical(logits=model(x_part))`; with fisher="empirical" it returns `(distribution, targets)`. The
        sequences may be a part of the batch. Gradients of parameters are neither computed nor touched, and the global
        random generators are left as they were. A pass that is not finite is left out and counted. Raises ValueError if
        a map was not used, or neither in one call over all time-steps nor in one at each of them, or if the log-loss
        depends on a parameter in other ways than through its map.
        """
        if self._estimator.update(forward):
            self._passes.newest = self._updates

    # ------------------------------------------------------------------------------------------------------- step

    def quadratic_cases(self, cases: int) -> slice:
        """Of a batch's `cases` sequences, those that `forward` predicts in the next step: in rotation over updates. On
        several ranks each asks for its own ones. Raises RuntimeError without a `quadratic_model`."""
        if self.quadratic_model is None:
            raise RuntimeError("quadratic_cases needs KFAC(quadratic_model=QuadraticModel())")
        return self.quadratic_model.cases(self._updates, cases)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, forward: Callable[[], Distribution] | None = None
    ) -> Any:
        """One update from the gradients in place. If they, or what is made of them, are not finite, nothing moves and
        the update counts as skipped.

        `forward`, for a `quadratic_model`, runs the model on `quadratic_cases` and returns its predictive distribution.
        It is called up to five times, without gradients or autocast, with noise that is not the training run's but the
        same each time; a recurrent state it must leave as it is.

        Raises RuntimeError before the first `update_statistics`, and ValueError if the very first factors cannot be
        inverted, if a block has only some of its gradients, if a parameter was unfrozen meanwhile, if there is a
        `forward` without a quadratic model or the other way round, or if the first one predicts otherwise when called
        again.
        """
        check_forward(forward is not None, self.quadratic_model is not None)
        self._estimator.require_frozen(p for group in self.param_groups for p in group["params"])
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._passes.newest < 0:
            raise RuntimeError("KFAC.step needs curvature: call update_statistics whenever statistics_due is True")
        with torch.autocast(self._estimator.device.type, enabled=False):  # a user may step where the loss is computed
            self._inverses.advance(self._updates, self._passes.newest, self._damping.before(self._updates))
            directions, curvature = self._directions()
        rule = self._rule(directions, curvature, forward)
        if rule is None:
            self._last = Taken()
            self._skipped += 1
        else:
            self._last = self._taken(rule, directions, curvature)
        self._updates += 1
        return loss

    def _directions(self) -> tuple[Directions, float]:
        return preconditioned(self._estimator, self._processes, self.loss_scale)

    def _rule(
        self, directions: Directions, curvature: float, forward: Callable[[], Distribution] | None
    ) -> Bounded | Chosen | None:
        """What says how far to go along Δ, and with which momentum; None if anything is not finite."""
        if not (math.isfinite(curvature) and curvature >= 0):
            return None
        if forward is None:
            return Bounded(self.kl_clip, curvature)
        return self._chosen(directions, curvature, forward)

    def _chosen(self, directions: Directions, curvature: float, forward: Callable[[], Distribution]) -> Chosen | None:
        """What the quadratic model makes of Δ and the last update; None if anything is not finite."""
        s = common_schedule_factor(self.param_groups)
        if not curvature:
            return STAY
        foretold = [(list(directions.values()), curvature)]
        if self._velocity_curvature > 0:
            foretold.append((running("velocity", directions, self.state), self._velocity_curvature))
        with self._estimator.private_randomness():
            forward = repeatable(forward, self._estimator.device)
            if not self._is_repeatable:
                require_repeatable(forward, self._processes.mean)
                self._is_repeatable = True
            found = plane(forward, list(directions), foretold, self.loss_scale)
        return found.averaged(self._processes.mean).chosen(self._damping.before(self._updates), s)

    def _taken(self, rule: Bounded | Chosen, directions: Directions, curvature: float) -> Taken:
        planned = steps(self.param_groups, directions, rule.step)
        eta, mu = move(planned, directions, self.state)
        if isinstance(rule, Chosen):
            self._velocity_curvature = rule.curvature
            return Taken(curvature, eta, mu, rule.kl, rule.change)
        change = predicted_change(planned, self.state) if self._damping.is_adaptive else 0.0
        return Taken(curvature, eta, mu, eta**2 * curvature / 2, change)

    # ---------------------------------------------------------------------------------------------------- damping

    @property
    def damping(self) -> float:
        """λ, which may be set at any time."""
        return self._damping.lasting

    @damping.setter
    def damping(self, value: float) -> None:
        check_positive("damping", value)
        self._damping.lasting = float(value)

    @property
    def reduction_due(self) -> bool:
        """Whether `adapt_damping` should be called after the step just taken. Not when there was none since it was: a
        gradient scaler may have left it out."""
        return self._damping.is_due(self._updates) and self._updates != self._adapted_at

    def adapt_damping(self, loss_before: float | Tensor, loss_after: float | Tensor) -> None:
        """Sets λ by the reduction ratio ρ = (h(θ+δ) − h(θ)) / M(δ), from the training loss of one batch, that of the
        last step, before and after it. Martens & Grosse (2015), section 6.5. Raises RuntimeError without an
        `adaptive_damping`."""
        before, after = (
            torch.as_tensor(loss, dtype=torch.float64).detach().cpu() for loss in (loss_before, loss_after)
        )
        change = self._processes.mean(after - before).item()
        self._reduction_ratio = self._damping.adapt(change, self._last.predicted_change)
        self._adapted_at = self._updates

    # ------------------------------------------------------------------------------------------- insight and state

    def coverage(self) -> Coverage:
        """Which parameters are trained how: block, parameters, approximation, factor sizes. Print it. Whether a linear
        map computes the logits, and with sampled targets needs no lag factors, is known after the first statistics
        pass."""
        return self._estimator.coverage()

    def stats(self) -> dict[str, float]:
        """What to log: step size and momentum taken, predicted KL change (½η²·ΔᵀF̂Δ, before momentum, or ½δᵀFδ by a
        quadratic model; nats per unit of the loss), damping, staleness in updates, extremes of ψ̂, worst condition
        numbers, and counts of what went wrong."""
        return {
            "step_size": self._last.eta,
            "momentum": self._last.mu,
            "predicted_kl": self._last.predicted_kl,
            "damping": self._damping.before(max(0, self._updates - 1)),
            "staleness": max(0, self._updates - 1 - self._inverses.made_from),
            **self._inverses.stats(),
            "skipped_statistics": self._estimator.skipped,
            "skipped_updates": self._skipped,
            "reduction_ratio": self._reduction_ratio,
        }

    def pause(self) -> None:
        """Stops background work until `resume`: while a clock stands still, it must get no time for free."""
        self._inverses.pause()

    def resume(self) -> None:
        self._inverses.resume()

    _NUMBERS = (
        "damping", "kl_clip", "loss_scale", "_updates", "_skipped", "_adapted_at", "_velocity_curvature",
        "_reduction_ratio",
    )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("KFAC belongs to its model and can be neither copied nor pickled: use state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: loads with `weights_only=True` and continues bit for bit."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group |= plain_numbers(group)
        state["kfac"] = {
            "approximation": self.approximation,
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
            "last": self._last._asdict(),
            "passes": self._passes.state_dict(),
            "estimator": self._estimator.state_dict(),
            "inverses": self._inverses.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, if the state is that of another model, approximation or optimiser."""
        state_dict = copy.deepcopy(state_dict)  # averages change in place: no two optimisers may hold the same ones
        state = state_dict.get("kfac", {})
        if state.get("approximation") != self.approximation:
            other = state.get("approximation", "another optimiser")
            raise ValueError(f"the state is that of {other}, not of {self.approximation}")
        self._estimator.require_fitting(state["estimator"])  # before anything is changed, as torch has it of its part
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "kfac"})
        self._passes.load_state_dict(state["passes"])
        self._estimator.load_state_dict(state["estimator"])
        self._inverses.load_state_dict(state["inverses"])
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self._last = Taken(**state["last"])
