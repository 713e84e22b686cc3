"""The file of a user's table: Parquet, or CSV as spreadsheets write it, with `,`, `;` or tabs, gzipped or not."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from typing import TYPE_CHECKING

from cluster.errors import SetMistake
from pipelines.data.own_set import decoded, read_bytes
from pipelines.data.public_set import read_csv

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = (",", ";", "\t")
HEAD = 1 << 16  # bytes that the first line is looked for in


def read_table(uri: str) -> pa.Table:
    """The table, its columns' names without blanks around them; of CSV and TSV all cells are texts.

    Raises:
        SetMistake: it is no table.
        UserError: it cannot be read.
    """
    from pyarrow import ArrowInvalid, parquet

    content = read_bytes(uri)
    try:
        if content[:4] == b"PAR1":
            table = parquet.read_table(io.BytesIO(content))
        else:
            content = _csv(content, uri)
            table = read_csv(content, delimiter=_delimiter(content, "\t" if ".tsv" in uri.lower() else ","))
    except ArrowInvalid as error:
        raise SetMistake(f"{uri} is no table: {error}") from error
    return table.rename_columns([name.strip() for name in table.column_names])


def _csv(content: bytes, uri: str) -> bytes:
    """The file unpacked.  Raises SetMistake where it is no text in UTF-8."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise SetMistake(f"{uri} cannot be unpacked: {error}") from error
    if content[:2] == b"PK":
        raise SetMistake(f"{uri} is an Excel workbook or another ZIP file; save the table as CSV in UTF-8")
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise SetMistake(f"{uri} is UTF-16; save it as UTF-8")
    decoded(content, uri)
    return content


def _delimiter(content: bytes, otherwise: str) -> str:
    """What separates the names in the first line, quoted ones left out."""
    lines = content[:HEAD].decode(errors="ignore").split("\n")
    names = re.sub(r'"[^"]*"', "", next(filter(str.strip, lines), ""))
    return max(DELIMITERS, key=names.count) if any(mark in names for mark in DELIMITERS) else otherwise
