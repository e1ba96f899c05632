"""`silu`: x * sigmoid(x), element-wise.

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
"""

import torch

from kernels.op import elementwise

SILU = elementwise("silu", 1, torch.nn.functional.silu)
