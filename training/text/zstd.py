"""Read .zst files with the zstandard package and detect cut files, which its own stream reader accepts as whole."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

CHUNK = 8192  # packed bytes at once; their unpacked bytes are held in memory
LARGEST_WINDOW = 1 << 31  # bytes; files packed with --long=31 need it


class DamagedError(ValueError):
    """The packed bytes are cut or not zstd."""


class ZstdReader(io.RawIOBase):
    """The bytes inside a file of one or several zstd frames."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw = raw
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.error = zstandard.ZstdError
        self.frame: Any = None  # the one being read
        self.packed = b""  # bytes read past the end of the last frame
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.packed or self.raw.read(CHUNK)
            if not packed:
                if self.frame is not None:
                    raise DamagedError("the last frame is cut short")
                return 0
            self.ready = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        frame = self.frame or self.decompressor.decompressobj()
        try:
            data: bytes = frame.decompress(packed)
        except self.error as error:
            raise DamagedError(str(error)) from error
        self.packed = frame.unused_data
        self.frame = None if frame.eof else frame
        return data
