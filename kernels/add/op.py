"""`add`: the element-wise sum."""

import torch

from kernels.op import elementwise

ADD = elementwise("add", 2, torch.add)
