"""The living parts of a training run, and how they go through a checkpoint.

Everything that decides the next update lives in `Session`, so that a run that was killed at any moment and started
again ends bit for bit where an undisturbed one ends. When to stop, and what is written when, is for `kfacrnn.train`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from kfacrnn import discovery, provenance, ranks
from kfacrnn.clock import Ledger
from kfacrnn.errors import UserError, first_line
from kfacrnn.memory import keep_freed_memory, peak_rss_mb
from kfacrnn.neighbours import Machine
from kfacrnn.run import Run
from kfacrnn.store import SCHEMA_VERSION, RunFolder
from kfacrnn.units import from_nats


class Diverged(Exception):
    """Why a run ends early. That is a result, not an error."""


class Session:
    """The living parts of a run: model, optimiser, schedule, data, clock, and the losses not yet written down. Tokens,
    losses and units are those of this process's sequences: see `kfacrnn.ranks`."""

    def __init__(self, run: Run):
        self.run = run
        self.update = 0
        self.tokens = 0
        self.device = ranks.device(run.device, run.precision)
        torch.set_num_threads(run.threads)
        keep_freed_memory()
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        self.ledger = Ledger(synchronise)
        build_task = discovery.load("tasks", run.task.name).build
        build_optimizer = discovery.load("optimizers", run.optimizer.name).build
        with ranks.first_goes_ahead():
            self.task = build_task(run.task, seed=run.seed, device=self.device, data=run.data)
        torch.manual_seed(run.seed)
        self.model = self.task.build_model()
        self.optimizer = build_optimizer(self.model, run.optimizer, task=self.task, seed=run.seed)
        self.parallel_model = ranks.parallel(self.model)
        ranks.reseed(run.seed, 0)
        schedule, updates = run.optimizer.schedule, run.budget.updates
        self.schedule = LambdaLR(self.optimizer, lambda update: schedule.factor(update, updates))
        self.losses: list[Tensor] = []  # training losses since the last row, on the device
        self.units: list[float] = []
        self.grad_norm: Tensor | None = None
        self.lr = 0.0
        self._least_valid, self._best_update = math.inf, 0
        self._seconds_at_last_row = 0.0
        self._untried: Path | None = None  # the checkpoint that was loaded, until an update has been made from it

    def begin(self, folder: RunFolder, command: str) -> None:
        """Continues from the newest whole checkpoint, or starts; writes configuration and provenance. Raises
        `UserError` for a checkpoint that is whole and yet not this run's."""
        from omegaconf import OmegaConf

        try:
            checkpoint = ranks.of_first(folder.load_checkpoint())
            if checkpoint is not None:
                self.load_state_dict(checkpoint)
                self._untried = folder.checkpoint
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{folder.checkpoint}: not of this run ({first_line(error)})") from error
        folder.metrics.truncate(self.update)
        session = {
            "start": provenance.now(),
            "from_update": self.update,
            "command": command,
            **provenance.commit(),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(self.run.device) | ranks.hardware(),
            "threads": self.run.threads,
            "ranks": ranks.count(),
            "jobs": int(os.environ.get("KFACRNN_JOBS", "1")),
        }
        meta = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run.run_id,
            "task": {"unit": self.task.unit, "metric": self.task.metric, "chance": self.task.chance},
            "data_checksums": self.task.checksums,
            "sessions": [*folder.meta().get("sessions", []), session],
        }
        self._machine = Machine()
        self.description = OmegaConf.to_yaml(dataclasses.asdict(self.run)), meta
        folder.describe(*self.description)
        folder.set_status("running", update=self.update, updates=self.run.budget.updates)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Time that counts as training. What an optimiser does in the background stands still at all other times."""
        with self.ledger("train"):
            if hasattr(self.optimizer, "resume"):
                self.optimizer.resume()
            yield
            if hasattr(self.optimizer, "pause"):
                self.optimizer.pause()

    def step(self) -> Any:
        """One update; returns the batch. Raises `UserError` where the first one after `begin` meets a state that is not
        of this run: optimisers look into theirs no sooner."""
        try:
            batch = self._step()
        except (KeyError, TypeError, AttributeError) as error:
            if self._untried is None:
                raise
            raise UserError(f"{self._untried}: not of this run ({first_line(error)})") from error
        self._untried = None
        return batch

    def _step(self) -> Any:
        batch = self.task.next_batch()
        if getattr(self.optimizer, "statistics_due", False):
            cases = self.optimizer.statistics_cases(batch.cases)
            with self._autocast():
                self.optimizer.update_statistics(lambda: self.task.predict(self.model, batch, cases))
        self.optimizer.zero_grad()
        noise = self._rng()
        with self._autocast():
            loss = self.task.loss(self.parallel_model, batch)
        loss.backward()
        self.grad_norm = self._gradient_norm() if self.run.budget.row_is_due(self.update + 1) else None
        self.lr = self.optimizer.param_groups[0]["lr"]
        self._take_step(batch)
        self._adapt_damping(batch, loss.detach(), noise)
        self.schedule.step()
        self.losses.append(loss.detach())
        self.units.append(batch.units)
        self.update += 1
        self.tokens += batch.tokens
        return batch

    def _take_step(self, batch: Any) -> None:
        if getattr(self.optimizer, "quadratic_model", None) is None:
            self.optimizer.step()
        else:
            cases = self.optimizer.quadratic_cases(batch.cases)
            self.optimizer.step(forward=lambda: self.task.predict(self.model, batch, cases))

    def _adapt_damping(self, batch: Any, loss: Tensor, noise: dict[str, Any]) -> None:
        """By what the loss of the same batch, with the same noise, is after the step."""
        if not getattr(self.optimizer, "reduction_due", False):
            return
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), self._autocast(), torch.random.fork_rng(devices=cuda):
            self._set_rng(noise)
            predicted = self.task.predict(self.model, batch, slice(None))
            after = predicted.log_loss(batch.targets).mean() / self.task.loss_scale
        self.optimizer.adapt_damping(loss, after)

    def _rng(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def _set_rng(self, rng: dict[str, Any]) -> None:
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.run.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _gradient_norm(self) -> Tensor:
        return get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _evaluation_is_due(self, update: int) -> bool:
        budget = self.run.budget
        return bool(budget.eval_every) and (update % budget.eval_every == 0 or update == budget.updates)

    def row(self) -> dict[str, Any]:
        """The row of metrics.csv for the updates since the last one. Raises `Diverged` if they are no result."""
        task, seconds_before = self.task, self._seconds_at_last_row
        losses, units = self._losses_of_all()
        self._require_finite(losses)
        valid = self._valid_nats() if self._evaluation_is_due(self.update) else None
        nats = float((losses * units).sum() / units.sum())
        metric = from_nats(task.metric)
        wall, seconds = self.ledger.total, self.ledger.wall["train"]
        row = {
            "update": self.update,
            "epoch": self.update / task.updates_per_epoch if task.updates_per_epoch else None,
            "tokens": ranks.total(self.tokens),
            "time_train_s": seconds,
            "time_eval_s": self.ledger.wall["eval"],
            "time_wall_s": wall,
            "cpu_s": self.ledger.cpu["train"],
            "train/nats": nats,
            "train/metric": metric(nats),
            "valid/nats": valid,
            "valid/metric": None if valid is None else metric(valid),
            "lr": self.lr,
            "grad_norm": None if self.grad_norm is None else float(self.grad_norm),
            "updates_per_s": len(self.losses) / max(seconds - seconds_before, 1e-9),
            "memory_mb": peak_rss_mb(),
            **self._reported(),
        }
        self.losses, self.units, self._seconds_at_last_row = [], [], seconds
        return row

    def others_cores(self) -> float | None:
        """Processors that other processes had since `begin`; None where that is not known, as with several ranks."""
        return self._machine.seen()["others_cores"] if ranks.count() == 1 else None

    def stats(self) -> dict[str, float]:
        """What the optimiser reports of itself, those that are finite: retries, clipped ψ̂, skipped updates and the
        like leave a trace."""
        return {name: value for name, value in self._reported().items() if math.isfinite(value)}

    def _reported(self) -> dict[str, float]:
        return self.optimizer.stats() if hasattr(self.optimizer, "stats") else {}

    def _losses_of_all(self) -> tuple[Tensor, Tensor]:
        """Of every update since the last row, over all processes: the loss, and the units that it averages over."""
        losses = torch.stack(self.losses).double().cpu() if self.losses else torch.empty(0, dtype=torch.float64)
        return ranks.means(losses, torch.tensor(self.units, dtype=torch.float64))

    def _require_finite(self, losses: Tensor) -> None:
        """All `losses` since the last row and, since the last update's own is never seen, its parameters."""
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            raise Diverged(f"loss not finite at update {self.update - len(self.losses) + 1 + int(bad[0])}")
        if self.is_last and not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise Diverged(f"parameters not finite after update {self.update}")

    def _valid_nats(self) -> float:
        nats = self.evaluate("valid")
        if self.is_last and not math.isfinite(nats):
            raise Diverged(f"validation loss not finite after update {self.update}")
        if nats < self._least_valid:
            self._least_valid, self._best_update = nats, self.update
        return nats

    def evaluate(self, split: str) -> float:
        """Mean nats per unit of the parameters as they are."""
        with self.ledger("eval"), torch.no_grad(), self._autocast():
            return self.task.evaluate(self.model, split)

    @property
    def is_best(self) -> bool:
        """Whether this update's validation is the best so far."""
        return 0 < self.update == self._best_update

    @property
    def is_last(self) -> bool:
        return self.update == self.run.budget.updates

    def state_dict(self) -> dict[str, Any]:
        """Of all processes together, complete in the first: a run may go on with another number of them."""
        losses, units = self._losses_of_all()
        rng, *others_rng = ranks.each(self._rng())
        return {
            "update": self.update,
            "tokens": ranks.total(self.tokens),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "task": self.task.state_dict(),
            "losses": losses.tolist(),
            "units": units.tolist(),
            "rng": rng,
            "others_rng": others_rng,
            "ledger": self.ledger.state_dict(),
            "seconds_at_last_row": self._seconds_at_last_row,
            "best": [self._least_valid, self._best_update],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = int(state["update"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.task.load_state_dict(state["task"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        own = 1 if ranks.is_first() else 0  # what has been counted is the first process's to carry on
        self.tokens, self.units = own * int(state["tokens"]), [own * float(units) for units in state["units"]]
        ranks.reseed(self.run.seed, self.update)
        for rng in [state["rng"], *state.get("others_rng", [])][ranks.rank() :][:1]:
            self._set_rng(rng)
        self.ledger.load_state_dict(state["ledger"])
        self._seconds_at_last_row = float(state["seconds_at_last_row"])
        least, best = state.get("best", (math.inf, 0))
        self._least_valid, self._best_update = float(least), int(best)
