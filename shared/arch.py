"""The targets that engines are built for, a row each.

Kernels and schemes ask a row what it can do (`arch.has_fp8`), never what it is called.
Limits are those of NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities".
"""

from dataclasses import dataclass

from shared.errors import UnsupportedArch


@dataclass(frozen=True, slots=True)
class Arch:
    """One target.

    Args:
        name: `sm_90`, or `cpu`.
        capability: (major, minor), None for `cpu`.
        max_shared_bytes: shared memory that one thread block may use; 0 for `cpu`.
        has_bf16_mma: tensor cores multiply bf16.
        has_fp8: e4m3 conversion and tensor cores in hardware.
        has_pdl: programmatic dependent launch (`griddepcontrol`).
        has_wgmma: tensor cores multiply for four warps at once, asynchronously (`wgmma`).
        is_portable: its machine code runs on later minor revisions of its major capability.
        min_driver: least driver, (major, minor) of CUDA, that loads its machine code.
    """

    name: str
    capability: tuple[int, int] | None
    max_shared_bytes: int
    has_bf16_mma: bool
    has_fp8: bool
    has_pdl: bool
    has_wgmma: bool
    is_portable: bool
    min_driver: tuple[int, int]

    @property
    def is_gpu(self) -> bool:
        """Claims that engines of this arch carry machine code."""
        return self.capability is not None


ARCHES: dict[str, Arch] = {
    row.name: row
    for row in (
        Arch("cpu", None, 0, False, False, False, False, False, (0, 0)),
        Arch("sm_80", (8, 0), 166_912, True, False, False, False, True, (12, 0)),
        Arch("sm_86", (8, 6), 101_376, True, False, False, False, True, (12, 0)),
        Arch("sm_89", (8, 9), 101_376, True, True, False, False, True, (12, 0)),
        Arch("sm_90", (9, 0), 232_448, True, True, True, True, False, (12, 0)),
        Arch("sm_100", (10, 0), 232_448, True, True, True, False, False, (13, 0)),
        Arch("sm_120", (12, 0), 101_376, True, True, True, False, False, (13, 0)),
    )
}


def arch_named(name: str) -> Arch:
    """The row called `name`.

    Raises:
        UnsupportedArch: there is none; names those that exist.
    """
    row = ARCHES.get(name)
    if row is None:
        raise UnsupportedArch(arch=name, known=", ".join(ARCHES))
    return row
