"""The commit primitives leave the old file, the new file, or nothing: never a part of one."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from formats.disk.durable import (
    TEMPORARY_SUFFIX,
    atomic_write_bytes,
    commit_exclusive,
    large_temporary,
    temporary_name,
)


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(TEMPORARY_SUFFIX)]


def test_atomic_write_replaces(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for data in (b"one", b"", b"three" * 1000):
        atomic_write_bytes(target, data)
        assert target.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_atomic_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch, call: str, code: int
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("builtins.open" if call == "open" else f"os.{call}", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        atomic_write_bytes(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old" and leftovers(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_commit_never_replaces(tmp_path: Path, monkeypatch, links: bool) -> None:
    if not links:
        # A file system without hard links, as some network mounts are.
        def no_link(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", no_link)
    final = tmp_path / "final"
    first, second = temporary_name(final), temporary_name(final)
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    assert commit_exclusive(first, final) is True
    assert commit_exclusive(second, final) is False
    assert final.read_bytes() == b"first" and os.listdir(tmp_path) == ["final"]


def test_one_of_many_racing_writers_wins(tmp_path: Path) -> None:
    final = tmp_path / "final"
    barrier = threading.Barrier(8)
    made: list[tuple[int, bool]] = []

    def write(number: int) -> None:
        temporary = temporary_name(final)
        temporary.write_bytes(bytes([number]) * 100)
        barrier.wait()
        made.append((number, commit_exclusive(temporary, final)))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number, won in made if won]
    assert len(made) == 8 and final.read_bytes() == bytes([winner]) * 100
    assert os.listdir(tmp_path) == ["final"]


def test_commit_flushes_before_it_names(tmp_path: Path, monkeypatch) -> None:
    """The order is the protocol: contents to the disk, then the name, then the directory."""
    events: list[str] = []
    real = {"fsync": os.fsync, "link": os.link}

    def fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[-1])
        real["fsync"](descriptor)

    def link(*args: object) -> None:
        events.append("link")
        real["link"](*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    temporary = temporary_name(tmp_path / "final")
    temporary.write_bytes(b"x")
    commit_exclusive(temporary, tmp_path / "final")
    assert events == ["fsync tmp", "link", f"fsync {tmp_path.name}"]


WRITES_FOR_EVER = """
import sys
from pathlib import Path
from formats.disk.durable import large_temporary
with large_temporary(Path(sys.argv[1])) as (name, file):
    print(name.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_goes_with_the_next_and_a_live_one_stays(tmp_path: Path) -> None:
    final, other = tmp_path / "[a].parquet", tmp_path / ".other.parquet.0123456789ab.tmp"
    other.write_bytes(b"of another file")
    command = [sys.executable, "-c", WRITES_FOR_EVER, str(final)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], **pipes) as writer:
        assert writer.stdout is not None
        live = writer.stdout.readline().strip()
        with large_temporary(final) as (temporary, file):
            file.write(b"x")
            assert sorted(os.listdir(tmp_path)) == sorted([live, temporary.name, other.name])
        assert sorted(os.listdir(tmp_path)) == sorted([live, other.name])
        writer.send_signal(signal.SIGKILL)
    assert sorted(os.listdir(tmp_path)) == sorted([live, other.name])
    with large_temporary(final) as (temporary, _):
        assert sorted(os.listdir(tmp_path)) == sorted([temporary.name, other.name])
    assert os.listdir(tmp_path) == [other.name]
