"""One broken shard on its way to the manifest."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from tests.data.shards import members, tar_bytes

Entry = tuple[str, bytes] | tarfile.TarInfo


class Case:
    """One shard on its way to the manifest: its entries or its bytes, and its keys."""

    def __init__(self, expected: str) -> None:
        self.expected, self.entries = expected, []
        self.good: list[str] = []
        self.bad: list[str] = []
        self.free: list[str] = []
        self.data: bytes | None = None
        self.special: Callable[[Path], None] | None = None

    def whole(self, *numbers: int) -> "Case":
        """Add whole samples."""
        for n in numbers:
            self.entries += members(n)
            self.good.append(f"{n:06d}")
        return self

    def add(
        self,
        number: int,
        image: bytes | None,
        text: bytes | None,
        good: bool,
        extension: str = "jpg",
        meta: bytes | None = b"{}",
    ) -> "Case":
        """Add a sample of these parts."""
        key = f"{number:06d}"
        parts = ((extension, image), ("txt", text), ("json", meta))
        self.entries += [(f"{key}.{e}", data) for e, data in parts if data is not None]
        (self.good if good else self.bad).append(key)
        return self

    def tar(self, kind: int = tarfile.USTAR_FORMAT) -> bytes:
        """The entries as a tar."""
        return tar_bytes(self.entries, kind)
