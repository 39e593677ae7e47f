"""From one level to the next: area means, details and slopes.

A level's values are its parents' means plus *details* whose mean over the four siblings is zero
(the Haar basis). A smooth image has predictable details: on a ramp they follow from the slope
between the neighbouring parents. So a level is predicted as parent + slope, and only what is left
is worth a network.

Tensors are channels-last, (b, h, w, c): 1x1 layers are plain matrix products and depthwise
convolutions run fastest.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def repeat(parents: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c"]:
    """Each parent's value at its four children."""
    return parents.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def parent_means(children: Float[Tensor, "b h2 w2 c"]) -> Float[Tensor, "b h w c"]:
    """Mean over each four siblings."""
    return F.avg_pool2d(children.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def detail(children: Float[Tensor, "b h2 w2 c"]) -> Float[Tensor, "b h2 w2 c"]:
    """What is left of the children without their parents' means."""
    return children - repeat(parent_means(children))


def slope_detail(
    parents: Float[Tensor, "b hp wp c"], present: Float[Tensor, "b hp wp 1"]
) -> Float[Tensor, "b h2 w2 c"]:
    """Details of the children by the slopes between parents, exact on linear images.

    Args:
        parents: values with a margin of one cell on every side.
        present: 1 where a parent exists; a slope towards an absent neighbour counts as zero.

    Returns:
        Details of the 2 (hp - 2) x 2 (wp - 2) children of the inner parents.
    """
    down = present[:, 1:] * present[:, :-1] * (parents[:, 1:] - parents[:, :-1])
    right = present[:, :, 1:] * present[:, :, :-1] * (parents[:, :, 1:] - parents[:, :, :-1])
    dy = (down[:, 1:, 1:-1] + down[:, :-1, 1:-1]) / 8
    dx = (right[:, 1:-1, 1:] + right[:, 1:-1, :-1]) / 8
    b, h, w, c = dy.shape
    sign = dy.new_tensor([-1.0, 1.0])
    vertical = dy[:, :, None, :, None, :] * sign.view(1, 1, 2, 1, 1, 1)
    horizontal = dx[:, :, None, :, None, :] * sign.view(1, 1, 1, 1, 2, 1)
    return (vertical + horizontal).reshape(b, 2 * h, 2 * w, c)
