"""A Parquet file that an export writes: refused where something stands already, and there only when it is complete."""

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from formats.disk.durable import commit_exclusive, large_temporary
from formats.disk.output_file import misplaced
from formats.errors import ConfigError, one_line


class NewParquetFile:
    """The name is checked first, so that nothing is computed for a file that cannot be.

    Raises:
        ConfigError: `out` exists, has another suffix, is an address, or has no place (`misplaced`).
    """

    def __init__(self, out: str | Path) -> None:
        self.path = Path(out).expanduser()
        if self.path.suffix != ".parquet" or self.path.exists():
            raise self._refusal("which exists" if self.path.exists() else "which has another suffix")
        first = self.path.parts[0]
        if (
            first.endswith(":") and not Path(first).exists()
        ):  # s3://bucket/x.parquet, of which Path makes s3:/bucket/...
            raise self._refusal("which is an address; write it here and copy it there")
        if reason := misplaced(self.path):
            raise self._refusal(reason)

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(f"--parquet must name a new .parquet file, got {self.path}, {reason}")

    def write(self, schema: pa.Schema, metadata: Mapping[str, str], tables: Iterable[pa.Table]) -> int:
        """Write the tables, one after the other, each at least one row group; returns the size in bytes.

        Memory: one table. Whatever ends the writing early leaves nothing behind; what a SIGKILL leaves, the
        next writing of this name takes away.

        Raises:
            ConfigError: the file cannot be written, or somebody made it meanwhile.
        """
        import pyarrow.parquet as pq

        try:
            # Opened there: given a name, pyarrow takes one such as `run:1/x` for an address.
            with large_temporary(self.path) as (temporary, file):
                with pq.ParquetWriter(
                    file, schema.with_metadata(dict(metadata)), compression="zstd"
                ) as writer:
                    for table in tables:
                        writer.write_table(table)
                file.flush()
                if not commit_exclusive(temporary, self.path):
                    raise self._refusal("which exists")
            return self.path.stat().st_size
        except OSError as error:
            reason = error.strerror or errno.errorcode.get(error.errno or 0) or one_line(error)
            raise ConfigError(
                f"--parquet must name a file that can be written, got {self.path}: {reason}"
            ) from None
