"""The recurrent layers against `torch.nn.LSTM`: one forward and backward pass at the sizes of a task.

`captured` is the pass that statistics come from, here over the whole batch: what K-FAC takes is a fraction of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from kfacrnn.bench.request import Request
from kfacrnn.run import Run

if TYPE_CHECKING:
    from kfacrnn.bench.subjects import Subject

BASELINE = "torch.nn.LSTM"


def bench(request: Request) -> None:
    request.check()
    planned = {task: request.run(task) for task in request.tasks}
    from kfacrnn.bench.cycle import METHOD
    from kfacrnn.bench.report import show, write
    from kfacrnn.bench.subjects import interleave, table
    from kfacrnn.neighbours import Machine

    machine, rows = Machine(), []
    for task, run in planned.items():
        records = interleave(f"lstm {task}", subjects(run), request.rounds)
        sizes = {name: getattr(run.task, name) for name in ("hidden", "layers", "batch_size", "bptt")}
        basics = {"task": task, "dtype": request.precision, "threads": request.threads, **sizes}
        found = [basics | {"layer": name} | record.row(records[BASELINE], "torch") for name, record in records.items()]
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        show(f"{shown}, {request.precision}, {found[0]['rounds']} rounds", *table(found, "layer", "torch"))
        rows += found
    write(request.file("lstm"), "lstm", request, machine, rows, method=METHOD)


def subjects(run: Run) -> dict[str, Subject]:
    """Layers with random weights, and what is to be timed of them."""
    import torch
    from torch import nn

    from kfacrnn import ranks
    from kfacrnn.bench.cycle import PLAIN, Kind, Weights
    from kfacrnn.bench.subjects import Phases, Step
    from kfacrnn.kfac.capture import Recorder
    from kfacrnn.memory import keep_freed_memory
    from kfacrnn.nn import GRU, LSTM, LayerNormLSTM

    torch.set_num_threads(run.threads)
    keep_freed_memory()
    torch.manual_seed(run.seed)
    device, sizes = ranks.device(run.device, run.precision), run.task
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    x = torch.randn(sizes.bptt, sizes.batch_size, sizes.hidden, device=device, requires_grad=True)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()

    class Pass:
        def __init__(self, layer: nn.Module, recorder: Recorder | None = None):
            self.weights: Weights = {PLAIN: 1.0}
            self._layer = layer.to(device)
            self._recorder = recorder
            self._phases = Phases(synchronise)

        def step(self, kind: Kind) -> Step:
            self._layer.zero_grad()
            x.grad = None
            with self._phases("train"):
                self._phases.clear()
                with self._recorder.recording() if self._recorder else nullcontext(), autocast():
                    output, _ = self._layer(x)
                output.sum().backward()
            return self._phases.step()

    found: dict[str, Subject] = {BASELINE: Pass(nn.LSTM(sizes.hidden, sizes.hidden, sizes.layers))}
    for kind in (LSTM, LayerNormLSTM, GRU):
        layer, name = kind(sizes.hidden, sizes.hidden, sizes.layers), f"kfacrnn.nn.{kind.__name__}"
        if kind is not LSTM:  # which without a tape is torch's
            found[name] = Pass(layer)
        found[f"{name}, captured"] = Pass(layer, Recorder(layer))
    return found
