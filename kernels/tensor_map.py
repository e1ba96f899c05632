"""Tensor maps: what the copy engine of a device with `wgmma` knows of a matrix, made by the driver for each launch.

Source: NVIDIA, CUDA driver API, cuTensorMapEncodeTiled.
"""

import ctypes

from kernels.driver import Driver
from kernels.variant import BOXED_BITS, Boxes

_BYTES, _ALIGNMENT = 128, 64
# CU_TENSOR_MAP_DATA_TYPE_..., by Triton's pointer type.
_TYPES = {"*i16": 1, "*i32": 3, "*bf16": 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_...
_PROMOTION_128 = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B


class TensorMap:
    """The parameters that Triton makes of one argument with `Boxes`: the map, the matrix's shape and its strides.

    Args:
        parameters: the addresses of their values, in order. They stay; what is there is of the last `describe`.
    """

    def __init__(self, driver: Driver, type_: str, boxes: Boxes) -> None:
        self._driver, self._boxes = driver, boxes
        self._code = _TYPES[type_]
        self._memory = (ctypes.c_uint8 * (_BYTES + _ALIGNMENT))()
        self._at = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT
        self._rows = ctypes.c_int32()
        self._others = (
            ctypes.c_int32(boxes.columns),
            ctypes.c_int64(boxes.columns),
            ctypes.c_int64(1),
        )
        self.parameters = [
            self._at,
            ctypes.addressof(self._rows),
            *(ctypes.addressof(value) for value in self._others),
        ]
        self._dims = (ctypes.c_uint64 * 2)(boxes.columns, 0)
        self._stride = ctypes.c_uint64(boxes.columns * BOXED_BITS[type_] // 8)
        self._box = (ctypes.c_uint32 * 2)(*reversed(boxes.box))
        self._steps = (ctypes.c_uint32 * 2)(1, 1)
        # Weights come back each step; x's rows change from step to step.
        self._made: dict[int, bytes] = {}
        self._last: tuple[int, int] | None = None

    def describe(self, pointer: int, rows: int | None) -> None:
        """Makes the map of the matrix at `pointer`; `rows` are its own where `Boxes` names who says them, else None."""
        fixed = self._boxes.rows
        if isinstance(fixed, int):
            if pointer not in self._made:
                self._encode(pointer, fixed)
                self._made[pointer] = ctypes.string_at(self._at, _BYTES)
            ctypes.memmove(self._at, self._made[pointer], _BYTES)
            return
        assert rows is not None, f"nobody says {fixed}"
        if (pointer, rows) != self._last:
            self._encode(pointer, rows)
            self._last = pointer, rows

    def _encode(self, pointer: int, rows: int) -> None:
        self._dims[1] = self._rows.value = rows
        result = self._driver.encode_tiled(
            self._at, self._code, 2, pointer, self._dims, ctypes.byref(self._stride), self._box,
            self._steps, 0, _SWIZZLES[self._boxes.swizzle], _PROMOTION_128, 0,
        )  # fmt: skip
        self._driver.check(result, "describing a matrix")
