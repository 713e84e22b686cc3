"""A file of any storage that tells the storage's faults from those of its content.

Parsers (pydicom, pyarrow) raise OSErrors of their own for a file that is cut off or corrupt: only the file itself knows
whether its bytes came.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.storage import Folder


class WatchedFile(io.RawIOBase):
    """A file, open to read, that remembers the error of its storage.

    Args:
        folder: that the path is relative to.
        path: of the file.

    Raises:
        OSError: it cannot be opened.
    """

    fault: OSError | None = None
    """What the storage failed with when bytes were read; None: it did not fail."""

    def __init__(self, folder: Folder, path: str) -> None:
        self._file = folder.filesystem.open_input_file(f"{folder.path}/{path}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except OSError as error:
            self.fault = error
            raise

    def close(self) -> None:
        if not self.closed:
            if hasattr(self, "_file"):  # a dropped file that could not be opened has none
                self._file.close()
            super().close()
