"""A 3 x 3 convolution with stride 2 that is right in bfloat16 on maps of 1 x 1 too.

On the CPU torch's bfloat16 weight gradient of such a convolution leaves the eight weights that only meet padding
uninitialized when the input is a single pixel (oneDNN; NaN in 83 of 100 trials, none on 2 x 2 inputs or in float32).
There the layer is its middle weight alone, which is computed as a 1 x 1 convolution; the others' gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StridedConv(nn.Conv2d):
    """``nn.Conv2d(n_in, n_out, 3, stride=2, padding=1)``.

    Args:
        n_in: channels of the input.
        n_out: channels of the output.
        bias: whether there is one.

    Example:
        >>> StridedConv(2, 4)(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__(n_in, n_out, 3, stride=2, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to half the height and width, rounded up."""
        low = torch.is_autocast_enabled(input.device.type) or input.dtype == torch.bfloat16
        if low and input.shape[2:] == (1, 1):
            return F.conv2d(input, self.weight[:, :, 1:2, 1:2], self.bias)
        return super().forward(input)
