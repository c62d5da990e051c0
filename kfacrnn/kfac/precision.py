"""In which precision large factors are decomposed and multiplied, and how many modes are told from uncorrelated ones,
where the user does not say.

What is small costs little and stays exact. From a few hundred rows, float32 takes a third off a decomposition; from a
million weights, the products with P and N are the dearest part of what K-FAC adds to an update, and bfloat16 takes a
third of float32's time on processors that multiply in it; and of some thousand modes of the A side of words, a sixth
or fewer are above the tolerance, which changes an update by 0.1 %, less than bfloat16 does. Float64 factors are
decomposed and multiplied in float64, with every mode.
"""

from __future__ import annotations

import torch

WIDE = 512  # rows of a factor
LARGE = 1 << 20  # weights of a map
FEW = 1e-2  # of |ψ̂|


def compute_dtype(factors: torch.dtype, widest: int) -> torch.dtype:
    """For the decompositions of a map whose widest dense factor has that many rows."""
    return factors if widest >= WIDE else torch.float64


def product_dtype(factors: torch.dtype, weights: int, device: torch.device) -> torch.dtype:
    """For the products with the decomposed factors of a map with that many weights."""
    is_worth_it = weights >= LARGE and factors == torch.float32
    return torch.bfloat16 if is_worth_it and multiplies_bfloat16(device) else factors


def lag_tolerance(factors: torch.dtype, weights: int) -> float:
    """What |ψ̂| must exceed for a mode of a map with that many weights to count as correlated over time."""
    return FEW if weights >= LARGE and factors == torch.float32 else 0.0


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; elsewhere bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_half_precision_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's LSTM runs in that dtype at all, and products not thirty times as long as in float32: on a CPU it
    is oneDNN, which wants instructions of the processor for bfloat16 and float16."""
    if device.type != "cpu":
        return True
    wanted = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in wanted or wanted[dtype]()
