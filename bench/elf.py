"""Shared libraries as bytes: sections, symbols, the GPU code inside, and a copy that loads anywhere.

Little-endian ELF for x86-64, and the fat binaries that nvcc puts into its section .nv_fatbin.
"""

from __future__ import annotations

import ctypes
import pathlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_WEAK, _GLOBAL = 2, 1  # kinds of symbols
# Tags of the dynamic section.
_NEEDED, _INIT, _FINI, _INIT_ARRAY_SIZE, _FINI_ARRAY_SIZE = 1, 12, 13, 27, 28
_PREINIT_ARRAY_SIZE, _VERSIONS, _VERSIONS_NEEDED, _VERSIONS_NEEDED_COUNT = 33, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
_IGNORED = 0x60000001  # a tag that no loader knows
_ALWAYS_THERE = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libpthread.so", "libdl.so", "librt.so", "ld-")
_FATBIN_MAGIC, _FATBIN_ELF = 0xBA55ED50, 2


@dataclass(frozen=True)
class Section:
    name: str
    address: int
    offset: int  # in the file
    size: int


@dataclass(frozen=True)
class GpuImage:
    """One ELF image inside a fat binary: `arch` is major * 10 + minor."""

    arch: int
    offset: int
    size: int


class Elf:
    """An ELF file. Raises `ValueError` for anything else."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self.data = data

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        start, size, count, names = *self._at("<Q", 0x28), *self._at("<HHH", 0x3A)
        headers = [self._at("<IIQQQQ", start + i * size) for i in range(count)]
        return tuple(Section(self._text(headers[names][4] + name), *rest) for name, _, _, *rest in headers)

    def section(self, name: str) -> Section:
        """The section of that name. Raises `KeyError` if there is none."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(f"no section {name}")

    def content(self, section: Section) -> bytes:
        return self.data[section.offset : section.offset + section.size]

    def code_of(self, function: str) -> bytes | None:
        """The machine code of an exported function, or None if it is not exported."""
        symbols, names = self.section(".dynsym"), self.section(".dynstr")
        for at in range(symbols.offset, symbols.offset + symbols.size, 24):
            name, _, index, address, size = self._at("<IBxHQQ", at)
            if index and self._text(names.offset + name) == function:
                home = self.sections[index]
                start = home.offset + address - home.address
                return self.data[start : start + size]
        return None

    def gpu_images(self) -> Iterator[GpuImage]:
        """The images in .nv_fatbin, compressed ones included."""
        section = self.section(".nv_fatbin")
        at, end = section.offset, section.offset + section.size
        while at < end - 16:
            magic, _, header, body = self._at("<IHHQ", at)
            if magic != _FATBIN_MAGIC:  # padding
                at += 8
                continue
            entry, at = at + header, at + header + body
            while entry < at:
                kind, _, header, size = self._at("<HHIQ", entry)
                if kind == _FATBIN_ELF:
                    yield GpuImage(self._at("<I", entry + 28)[0], entry + header, size)
                entry += header + size

    def image(self, image: GpuImage) -> Elf:
        return Elf(self.data[image.offset : image.offset + image.size])

    def write_loadable(self, path: pathlib.Path) -> None:
        """A copy that the dynamic loader takes without the libraries that the original is linked to.

        Its initialisers don't run, its GPU code is left out, and every function that isn't found is a null pointer.
        So its functions can be called as far as they compute with their arguments alone.
        """
        gpu_code = next((s for s in self.sections if s.name == ".nv_fatbin"), Section("", 0, len(self.data), 0))
        rest = gpu_code.offset + gpu_code.size
        before, behind = bytearray(self.data[: gpu_code.offset]), bytearray(self.data[rest:])
        for offset, value in self._changes():
            part, start = (before, 0) if offset < len(before) else (behind, rest)
            part[offset - start : offset - start + len(value)] = value
        with path.open("wb") as file:
            file.write(before)
            file.seek(rest)  # the hole reads as zeros
            file.write(behind)

    def _changes(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, new bytes) that make the file load alone."""
        names = self.section(".dynstr")
        dynamic = self.section(".dynamic")
        for at in range(dynamic.offset, dynamic.offset + dynamic.size, 16):
            tag, value = self._at("<QQ", at)
            if tag in (_INIT_ARRAY_SIZE, _FINI_ARRAY_SIZE, _PREINIT_ARRAY_SIZE):
                yield at, struct.pack("<QQ", tag, 0)
            elif tag in (_INIT, _FINI, _VERSIONS, _VERSIONS_NEEDED, _VERSIONS_NEEDED_COUNT) or (
                tag == _NEEDED and not self._text(names.offset + value).startswith(_ALWAYS_THERE)
            ):
                yield at, struct.pack("<QQ", _IGNORED, 0)
        symbols = self.section(".dynsym")
        for at in range(symbols.offset, symbols.offset + symbols.size, 24):
            _, info, index = self._at("<IBxH", at)
            if not index and info >> 4 == _GLOBAL:  # undefined: weak ones may stay so
                yield at + 4, bytes([_WEAK << 4 | info & 15])

    def _at(self, pattern: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(pattern, self.data, offset)

    def _text(self, offset: int) -> str:
        return self.data[offset : self.data.find(b"\0", offset)].decode("latin1")


def demangled(name: str) -> str:
    """A C++ name as it is written in C++. Raises `ValueError` for what is no mangled name."""
    libraries = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None)
    demangle, free = libraries[0].__cxa_demangle, libraries[1].free
    demangle.restype, demangle.argtypes = ctypes.c_void_p, [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    free.argtypes = [ctypes.c_void_p]
    status = ctypes.c_int()
    written = demangle(name.encode(), None, None, ctypes.addressof(status))
    if not written:
        raise ValueError(f"not a mangled C++ name: {name!r}")
    text = ctypes.cast(written, ctypes.c_char_p).value or b""
    free(written)
    return text.decode()
