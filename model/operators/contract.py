"""The sparse depthwise convolution that a network calls, and what each backend must compute.

A depthwise convolution over the points present (∞-Diff, Sec. 4.2), of which the formulas stand in
`model.operators.normalisation`. Taps without a point, and taps outside the image, are absent. The
orientation is conv2d's (cross-correlation): tap (a, b) sees the point at (y + a - r, x + b - r).

A backend is a pure function of (values, weight, neighbours, normalisation), and computes, in
float32 at least and returned in the values' dtype, what `reference` computes, outputs and
gradients. Parameters do not depend on it, so any model runs on any:

    reference      plain torch: the definition, and the fast path on a CPU
    triton         one fused kernel forward and two backward, on a GPU; by Triton's interpreter
                   elsewhere, which is for tests
    torchsparse    torchsparse's gather-scatter convolution, where that library is installed

What was asked for runs, or says what to install: nothing falls back.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from model.operators import reference
from model.operators.neighbours import Neighbours
from model.operators.normalisation import Normalisation

Backend = Literal["reference", "triton", "torchsparse"]
Compute = Callable[[Tensor, Tensor, Neighbours, Normalisation], Tensor]


def sparse_depthwise(
    values: Float[Tensor, "n c"],
    weight: Float[Tensor, "_c k k"],
    neighbours: Neighbours,
    *,
    normalisation: Normalisation,
    backend: Backend,
) -> Float[Tensor, "n c"]:
    """Each channel of the points' values convolved with its own k x k taps."""
    if len(values) != len(neighbours):
        raise ValueError(
            f"{len(values)} values for {len(neighbours)} points: neighbours belong to one set of "
            "points; find them again for this one"
        )
    if weight.shape[0] != values.shape[1]:
        raise ValueError(
            f"the weight is for {weight.shape[0]} channels, but the values have "
            f"{values.shape[1]}; a depthwise weight is (channels, kernel, kernel)"
        )
    if weight.shape[-1] != neighbours.kernel:
        raise ValueError(
            f"the weight has {weight.shape[-1]} x {weight.shape[-1]} taps, but neighbours were "
            f"found for {neighbours.kernel}; find them with kernel={weight.shape[-1]}"
        )
    places = {values.device, weight.device, neighbours.start.device}
    if len(places) > 1:
        raise ValueError(
            f"values, weight and neighbours are on {sorted(map(str, places))}; move them to one "
            "device (Neighbours.to)"
        )
    if normalisation not in get_args(Normalisation):
        raise ValueError(
            f"there is no normalisation {normalisation!r}; there are {get_args(Normalisation)}"
        )
    if backend not in get_args(Backend):
        raise ValueError(f"there is no backend {backend!r}; there are {get_args(Backend)}")
    compute = _backend(backend)
    precise = torch.promote_types(values.dtype, torch.float32)
    return compute(values, weight.to(precise), neighbours, normalisation)


def _backend(name: Backend) -> Compute:
    if name == "reference":
        return reference.sparse_depthwise
    if name == "triton":
        try:
            from model.operators.triton_kernels import sparse_depthwise as by_triton
        except ImportError as error:
            raise ValueError(
                f"backend 'triton' is not here ({error}): pip install triton (Linux, with a "
                "GPU), or use backend='reference'"
            ) from error
        return by_triton
    try:
        from model.operators.torchsparse_adapter import sparse_depthwise as by_torchsparse
    except ImportError as error:
        raise ValueError(
            f"backend 'torchsparse' is not here ({error}): build it from "
            "github.com/mit-han-lab/torchsparse against this torch (it needs a compiler and a "
            "GPU), or use backend='triton' or 'reference'"
        ) from error
    return by_torchsparse
