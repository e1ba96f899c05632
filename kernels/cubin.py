"""Reads a kernel's parameter list out of a cubin, with no CUDA tools.

A cubin is an ELF file; section `.nv.info.<kernel>` holds attributes, EIATTR_KPARAM_INFO among them.
Source: NVIDIA's ELF attributes as `cuobjdump -elf` names them.
"""

import struct

_KPARAM_INFO = 0x17
_SIZED_VALUE = 4


def parameter_sizes(cubin: bytes) -> dict[str, tuple[int, ...]]:
    """Bytes of each parameter, in order, by kernel."""
    table, entry_bytes, num_sections, names_index = _section_table(cubin)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_bytes)
        for i in range(num_sections)
    ]
    names = sections[names_index][4]
    found = {}
    for section in sections:
        start = names + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".nv.info."):
            body = cubin[section[4] : section[4] + section[5]]
            found[name.removeprefix(".nv.info.")] = _parameters(body)
    return found


def _section_table(cubin: bytes) -> tuple[int, int, int, int]:
    assert cubin[:4] == b"\x7fELF", "a cubin is an ELF file"
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, num_sections, names_index = struct.unpack_from("<HHH", cubin, 58)
    return table, entry_bytes, num_sections, names_index


def _parameters(info: bytes) -> tuple[int, ...]:
    parameters = []
    at = 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED_VALUE:
            if attribute == _KPARAM_INFO:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at)
                parameters.append((ordinal, packed >> 18))
            at += value
    return tuple(size for _, size in sorted(parameters))
