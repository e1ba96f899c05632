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
        has_fp8: e4m3 conversion and tensor cores in hardware.
        has_pdl: programmatic dependent launch (`griddepcontrol`).
        has_wgmma: tensor cores multiply for four warps at once, asynchronously (`wgmma`).
        is_portable: its machine code runs on later minor revisions of its major capability.
        min_driver: least driver, (major, minor) of CUDA, that loads its machine code.
    """

    name: str
    capability: tuple[int, int] | None
    max_shared_bytes: int
    has_fp8: bool
    has_pdl: bool
    has_wgmma: bool
    is_portable: bool
    min_driver: tuple[int, int]

    @property
    def is_gpu(self) -> bool:
        """Claims that engines of this arch carry machine code."""
        return self.capability is not None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Claims that a device of this compute capability runs its engines: from machine code on the arch's own and,
        where that is portable, on later minor revisions; from PTX, which portable arches carry, on any later one."""
        if self.capability is None:
            return False
        return self.capability == capability or (self.is_portable and capability > self.capability)


ARCHES: dict[str, Arch] = {
    row.name: row
    for row in (
        Arch("cpu", None, 0, False, False, False, False, (0, 0)),
        Arch("sm_80", (8, 0), 166_912, False, False, False, True, (12, 0)),
        Arch("sm_86", (8, 6), 101_376, False, False, False, True, (12, 0)),
        Arch("sm_89", (8, 9), 101_376, True, False, False, True, (12, 0)),
        Arch("sm_90", (9, 0), 232_448, True, True, True, False, (12, 0)),
        Arch("sm_100", (10, 0), 232_448, True, True, False, False, (13, 0)),
        Arch("sm_120", (12, 0), 101_376, True, True, False, False, (13, 0)),
    )
}


def arch_for(capability: tuple[int, int]) -> Arch | None:
    """The best arch whose engines run on a device of this compute capability; None where there is none.

    For a device that no row is for, that is the latest portable one: it also asks for the least shared memory.
    """
    running = [arch for arch in ARCHES.values() if arch.runs_on(capability)]
    return max(running, key=lambda arch: arch.capability or (0, 0), default=None)


def arch_named(name: str) -> Arch:
    """The row called `name`.

    Raises:
        UnsupportedArch: there is none; names those that exist.
    """
    row = ARCHES.get(name)
    if row is None:
        raise UnsupportedArch(arch=name, known=", ".join(ARCHES))
    return row
