"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes `path`'s place if the block succeeds.

    A full disk or a killed process leaves an existing file as it was.

    Args:
        path: file to write or replace.

    Yields:
        Path to write to instead, in the same folder.

    Raises:
        OSError: whatever writing raises; the temporary file is gone then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
