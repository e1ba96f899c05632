"""`mul`: the element-wise product."""

import torch

from kernels.op import elementwise

MUL = elementwise("mul", 2, torch.mul)
