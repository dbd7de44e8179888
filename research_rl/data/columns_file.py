"""Rows of a parquet file in bounded memory, whatever it holds. Knows Arrow; knows no question.

A few kilobytes of parquet can stand for gigabytes: a long text is written once and named by every row, or differs from the one before
in its end alone. Texts are therefore read as numbers of a dictionary, and become Python's only after their sizes were added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from research_rl.data.compressed import LONGEST_LINE
from research_rl.errors import DataError

__all__ = ["rows"]

_BATCH = 1024
_MOST_BYTES = 1 << 30
"""Of one row group when it is read."""
_MOST_AT_ONCE = _MOST_BYTES // 8
_OF_A_VALUE = 16
"""Bytes that any value takes beside its content: levels, offset or number, and a place in a list."""


def rows(path: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file in order, each column by its name.

    Raises DataError for a file that is damaged, or that has a row group above 1 GiB or a row above LONGEST_LINE bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 1
    try:
        metadata = pq.ParquetFile(stream).metadata
        _require_small_groups(path, metadata)
        file = pq.ParquetFile(stream, metadata=metadata, read_dictionary=_texts(metadata))
        for batch in file.iter_batches(batch_size=_batch_rows(metadata)):
            for part in _parts(path, batch, first):
                yield from part.to_pylist()
            first += batch.num_rows
    # pyarrow raises OSError for damaged pages and headers, not for the disk alone.
    except (pa.ArrowException, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no whole parquet file ({' '.join(str(error).split())}); fetch or write it again") from None


def _leaves(metadata: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield every column of every row group with the group's number and the column's place in the schema."""
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            yield group, metadata.row_group(group).column(place), metadata.schema.column(place)


def _texts(metadata: Any) -> list[str]:
    """Return the columns of texts that can be read by a dictionary."""
    texts = {column.path for _, _, column in _leaves(metadata) if column.physical_type == "BYTE_ARRAY"}
    dense = {column.path for _, chunk, column in _leaves(metadata) if _dense(chunk, column)}
    return sorted(texts - dense)


def _dense(chunk: Any, column: Any) -> bool:
    """Return whether texts are written as what differs from the one before, which Arrow does not read by a dictionary."""
    return column.physical_type == "BYTE_ARRAY" and any(name.startswith("DELTA_") for name in chunk.encodings)


def _require_small_groups(path: Path, metadata: Any) -> None:
    sizes = [0] * metadata.num_row_groups
    for group, chunk, column in _leaves(metadata):
        sizes[group] += _decoded_bytes(chunk, column)
    for group, size in enumerate(sizes):
        if size > _MOST_BYTES:
            raise DataError(
                f"{path}: row group {group} takes up to {size:,} bytes when it is read, the limit is {_MOST_BYTES:,}; "
                "write the file with fewer rows in a group (row_group_size), its texts by a dictionary or plain"
            )


def _decoded_bytes(chunk: Any, column: Any) -> int:
    """Return the most bytes that a column of a row group takes; texts by a dictionary count once."""
    values, packed = int(chunk.num_values), int(chunk.total_uncompressed_size)
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return values * (int(column.length) + _OF_A_VALUE)
    # Each text may repeat all that stood before; where every row has one, `_batch_rows` takes few of them at a time.
    if _dense(chunk, column) and column.max_repetition_level:
        return values * (packed + _OF_A_VALUE)
    return packed + values * _OF_A_VALUE


def _batch_rows(metadata: Any) -> int:
    """Return how many rows are read at once: as many as stay below the limit though each text repeated all texts before it."""
    sizes = [int(chunk.total_uncompressed_size) for _, chunk, column in _leaves(metadata) if _dense(chunk, column)]
    return max(1, min(_BATCH, _MOST_AT_ONCE // max([1, *sizes])))


def _parts(path: Path, batch: Any, first: int) -> Iterator[Any]:
    """Yield a batch in parts that may become Python's objects, each of a single row or of at most LONGEST_LINE bytes."""
    size = sum(_bytes(column) for column in batch.columns)
    if size <= LONGEST_LINE or not batch.num_rows:
        yield batch
    elif batch.num_rows == 1:
        raise DataError(f"{path}:{first}: the row takes {size:,} bytes, the limit is {LONGEST_LINE:,}; shorten its texts or split it")
    else:
        half = batch.num_rows // 2
        yield from _parts(path, batch.slice(0, half), first)
        yield from _parts(path, batch.slice(half), first + half)


def _bytes(array: Any) -> int:
    """Return the bytes of an array's values, of texts that are named by number the bytes of all that they name."""
    import pyarrow as pa

    compute: Any = import_module("pyarrow.compute")  # its functions are made when it is imported, where no type checker sees them
    of_places = len(array) * _OF_A_VALUE
    if pa.types.is_dictionary(array.type):
        return of_places + (compute.sum(compute.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if pa.types.is_struct(array.type):
        return of_places + sum(_bytes(part) for part in array.flatten())
    if pa.types.is_map(array.type):
        start, end = (int(array.offsets[place].as_py()) for place in (0, -1))
        return of_places + sum(_bytes(part.slice(start, end - start)) for part in (array.keys, array.items))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return of_places + _bytes(array.flatten())
    return of_places + int(array.nbytes)
