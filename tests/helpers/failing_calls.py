"""One call of the file system that fails."""

import builtins
import io
import os
from pathlib import Path
from typing import Any


class Failing:
    """Makes the n-th call of one kind of operation below a directory fail."""

    def __init__(self, kind: str, number: int, code: int, out: Path, flag: Path) -> None:
        self.kind, self.left, self.code, self.out, self.flag = kind, number, code, str(out), flag

    def strike(self, *paths: Any) -> None:
        if not any(str(path).startswith(self.out) for path in paths):
            return
        self.left -= 1
        if self.left == 0:
            self.flag.touch()
            raise OSError(self.code, os.strerror(self.code), str(paths[0]))

    def install(self) -> None:
        if self.kind == "write":
            real_open, outer = builtins.open, self

            def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                handle = real_open(file, mode, *args, **kwargs)
                if not any(letter in mode for letter in "wxa+") or not isinstance(file, str | os.PathLike):
                    return handle
                return FailingFile(handle, str(file), outer)

            builtins.open = io.open = opened  # type: ignore[assignment]
            return
        real = getattr(os, self.kind)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if self.kind == "fsync":
                self.strike(os.readlink(f"/proc/self/fd/{args[0]}"))
            else:
                self.strike(*args[:2])
            return real(*args, **kwargs)

        setattr(os, self.kind, failing)


class FailingFile:
    """A file whose writes may fail, everything else passed through."""

    def __init__(self, handle: Any, path: str, failing: Failing) -> None:
        self._handle, self._path, self._failing = handle, path, failing

    def write(self, data: Any) -> int:
        self._failing.strike(self._path)
        return self._handle.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *args: Any) -> None:
        self._handle.close()
