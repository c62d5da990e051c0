"""Which Fisher block holds which of a model's trained parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfacrnn.kfac.block import Block, Curvature
from kfacrnn.kfac.blocks import block_of
from kfacrnn.kfac.capture import Recorder
from kfacrnn.kfac.tied import can_be_tied, tied_blocks


def partition(
    model: nn.Module, recorder: Recorder, trained: set[Tensor], curvature: Curvature
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    """A block for every trained map, and the trained parameters that no map holds, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in trained:
        if parameter not in names:
            raise ValueError(f"params holds a {list(parameter.shape)} that is not a parameter of the model")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{names[parameter]} is {parameter.dtype}: train in float32 and compute under autocast")
    blocks: dict[str, Block] = {}
    owners: dict[Tensor, list[tuple[range, str]]] = {}
    tied: list[tuple[str, str]] = []
    for name, map in recorder.maps.items():
        if not all(p in names for p in map.parameters):
            continue  # computed from other parameters, which no map holds: parametrizations
        frozen = [names[p] for p in map.parameters if p not in trained]
        if frozen:
            raise ValueError(f"{name} is trained only in part, {frozen[0]} is not: train all of it or none")
        for parameter in map.parameters:
            rows = range(len(parameter))[map.rows]
            for taken, owner in owners.setdefault(parameter, []):
                if rows.start < taken.stop and taken.start < rows.stop:
                    if not can_be_tied(map, recorder.maps[owner]):
                        raise ValueError(
                            f"{names[parameter]} is shared by {owner} and {name}: only an nn.Embedding and an "
                            "nn.Linear may have one weight; untie them"
                        )
                    tied.append((owner, name))
            owners[parameter].append((rows, name))
        blocks[name] = block_of(name, map, curvature, names)
    for pair in tied:
        blocks |= tied_blocks({name: recorder.maps[name] for name in pair}, curvature, names)
    return blocks, {names[p]: p for p in names if p in trained and p not in owners}
