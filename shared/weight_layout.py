"""Where packed tensors lie in weight blobs, and what their bytes are.

Apart from the store, which it does not know, because an edit here changes what engines are made of.
"""

import torch

from shared.engine import MAX_WEIGHT_BLOB_BYTES, WEIGHT_ALIGNMENT_BYTES, StoredTensor


class WeightLayout:
    """Places tensors one after the other, at multiples of 256 bytes.

    Args:
        max_blob_bytes: no blob is longer, except one that holds a single larger tensor.
    """

    def __init__(self, max_blob_bytes: int = MAX_WEIGHT_BLOB_BYTES) -> None:
        self._max_blob_bytes = max_blob_bytes
        self._blob = 0
        self._end = 0

    def place(self, tensor: torch.Tensor) -> StoredTensor:
        """Where `tensor` lies, after all that were placed before."""
        offset = -(-self._end // WEIGHT_ALIGNMENT_BYTES) * WEIGHT_ALIGNMENT_BYTES
        if self._end and offset + tensor.nbytes > self._max_blob_bytes:
            self._blob, offset = self._blob + 1, 0
        self._end = offset + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        return StoredTensor(self._blob, offset, tuple(tensor.shape), dtype)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values, row by row; a view of it where it is dense and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
