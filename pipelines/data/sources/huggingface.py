"""An image data set of the Hugging Face Hub (data.root=OWNER/NAME[@REVISION]), or a folder of Parquet laid out alike.

The image column is what `datasets` calls Image: a struct of bytes and path (or plain bytes). Labels are the column
label or labels, else the first ClassLabel: names, numbers of names, or lists of either; a row that has any is none of
the others, and one without is unlabelled. patient_id, study_id, view and
split are taken where there are columns of these names; else the split is the one that the file's name tells, as in
`datasets`. data.subset picks one of several configurations, each a folder of its own.
"""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.faults import with_retries
from cluster.storage import Folder
from pipelines.data.files import manifest_table
from pipelines.data.own_table import SPLIT_NAMES
from pipelines.data.public_set import Card, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.manifest import assess
from pipelines.data.watched import WatchedFile
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    from pipelines.data.image.decode import Decoded

CARD = Card(
    title="Hugging Face data set",
    images=0,
    where="https://huggingface.co/datasets",
    licence="as its card says",
    citation="as its card says",
)
SPLIT_WORDS = SPLIT_NAMES | {"dev": "val", "eval": "test", "evaluation": "test"}
SPLIT = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z0-9])")
LABELS = ("label", "labels")
OTHERS = ("class", "classes", "finding", "findings", "diagnosis", "category")
PLAIN = ("patient_id", "study_id", "view", "split")
READING = threading.Lock()  # a row group is read once for all threads, and a file by one of them at a time


class HuggingFace:
    name, card = "huggingface", CARD

    def manifest(self, settings: DataSettings, seed: int) -> pa.Table:
        """One row per image, in the order of the files; `uri` is FILE#ROW.  Image bytes are not read.

        Raises:
            UserError: there is no Parquet, or none with images, or several configurations and no data.subset.
        """
        import pyarrow.compute as pc

        tree = _tree(settings)
        paths = _paths(tree, settings.subset)
        table = assess(manifest_table(row | {"bytes": tree.files[path]} for path in paths
                                   for row in _rows(tree.root, path)))
        if not table.num_rows:
            raise tree.missing("row")
        if pc.all(pc.equal(table["patient_id"], table["path"])).as_py():
            say(f"{tree.root} has no column patient_id: each image counts as a patient of its own")
        return table

    def load(self, row: Mapping[str, Any], settings: DataSettings) -> Decoded:
        from pipelines.data.image.decode import decode

        path, _, index = row["path"].rpartition("#")
        root = _root(settings)
        content = with_retries(lambda: _content(root, path, int(index)), f"{root}/{path}")
        return decode(content or b"", settings, view=row["view"])


def _tree(settings: DataSettings) -> Tree:
    tree = Tree(_root(settings), CARD)
    try:
        _ = tree.files
    except ValueError:
        raise
    except Exception as error:  # the Hub's client raises many kinds: no network, no access
        raise UserError(f"data.root={settings.root!r} cannot be read from {CARD.where}: {error}") from error
    return tree


def _root(settings: DataSettings) -> str:
    root = settings.root
    if not root:
        raise UserError(f"data=huggingface needs data.root=OWNER/NAME of a data set at {CARD.where}, or a folder of "
                         "Parquet")
    if "://" in root or os.path.isdir(os.path.expanduser(root)):
        return Folder(root).uri
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", root):
        return f"hf://datasets/{root}"
    raise UserError(f"data.root={root!r} is no folder, and no OWNER/NAME of a data set at {CARD.where}")


def _paths(tree: Tree, subset: str | None) -> list[str]:
    paths = [path for path in tree.files if path.endswith(".parquet")]
    configurations = sorted({name for path in paths if (name := _configuration(path))})
    if subset:
        paths = [path for path in paths if _configuration(path) == subset]
    elif len(configurations) > 1:
        raise UserError(f"data.root={tree.root!r} holds several configurations; set data.subset to one of "
                         f"{', '.join(configurations)}")
    if not paths:
        raise tree.missing(f"Parquet file of data.subset={subset!r}" if subset else
                           "Parquet file (a data set of another format has a branch of Parquet: add "
                           "@refs/convert/parquet to its name)")
    return paths


def _configuration(path: str) -> str | None:
    """The folder that names a configuration: the first that is neither `data` nor a split's."""
    return next((part for part in path.split("/")[:-1] if part != "data" and part.lower() not in SPLIT_WORDS), None)


def _rows(root: str, path: str) -> Iterator[dict[str, Any]]:
    file = _parquet(root, path)
    _image_column(file.schema_arrow, f"{root}/{path}")
    label, names = _label_column(file.schema_arrow)
    columns = [name for name in (*PLAIN, label) if name in file.schema_arrow.names]
    words = SPLIT.findall(path.lower())
    number = 0
    for group in range(file.num_row_groups):
        cells = file.read_row_group(group, columns=columns).to_pylist() if columns else []
        for cell in cells or [{}] * file.metadata.row_group(group).num_rows:
            place = f"{path}#{number}"
            number += 1
            plain = {name: str(cell[name]) if cell.get(name) not in (None, "") else None for name in PLAIN}
            split = SPLIT_WORDS.get((plain["split"] or (words[-1] if words else "")).lower())
            yield plain | {
                "source": "huggingface", "uri": f"{root}/{place}", "path": place, "split": split,
                "patient_id": plain["patient_id"] or place, "absent": [], "uncertain": [], "masks": [],
                "labels": _labels(cell.get(label), names, f"{root}/{place}"),
            }


def _image_column(schema: pa.Schema, where: str) -> str:
    """The column of images, `image` where there are several (masks, for one)."""
    import pyarrow as pa

    found = [field.name for field in schema
             if field.type in (pa.binary(), pa.large_binary())
             or (pa.types.is_struct(field.type) and {f.name for f in field.type} == {"bytes", "path"})]
    if not found:
        raise UserError(f"{where} has no column of images (a struct of bytes and path); it has "
                         f"{', '.join(schema.names)}")
    return "image" if "image" in found else found[0]


def _label_column(schema: pa.Schema) -> tuple[str | None, list[str] | None]:
    """The column of labels, and what its numbers stand for."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    named = {name: names for name, feature in features.items() if (names := _names(feature))}
    for name in (*LABELS, *named, *OTHERS):
        if name in schema.names:
            return name, named.get(name)
    return None, None


def _names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them, as the releases of `datasets` have written it."""
    if isinstance(feature, list):
        return _names(feature[0])
    if not isinstance(feature, dict):
        return None
    return feature["names"] if feature.get("_type") == "ClassLabel" else _names(feature.get("feature"))


def _labels(value: Any, names: list[str] | None, where: str) -> list[str]:
    """The labels of a cell: texts as they are, numbers by `names`; -1 stands for no label, as in `datasets`.

    Raises:
        UserError: a number has no name.
    """
    values = [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "") and v == v]  # not NaN
    return [str(v) for v in values] if names is None else [
        v if isinstance(v, str) else _name(v, names, where) for v in values if isinstance(v, str) or v >= 0]


def _name(number: float, names: list[str], where: str) -> str:
    if number != int(number) or number >= len(names):
        raise UserError(f"{where}: label {number} of {len(names)} names ({', '.join(names)}); correct the column, or "
                        "the names in the file's metadata")
    return names[int(number)]


def _content(root: str, path: str, row: int) -> bytes | None:
    starts = _starts(root, path)
    group = bisect_right(starts, row) - 1
    with READING:
        images = _images(root, path, group)
    cell = images[row - starts[group]].as_py()
    return cell["bytes"] if isinstance(cell, dict) else cell


@lru_cache(maxsize=2)
def _images(root: str, path: str, group: int) -> pa.ChunkedArray:
    """The images of one row group: those of a shard are asked for one after the other.

    Raises:
        OSError: the storage failed.
        Refused: the row group is corrupt.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    from pipelines.data.image.picture import Refused

    listed = _parquet(root, path)
    column = _image_column(listed.schema_arrow, f"{root}/{path}")
    with WatchedFile(Folder(root), path) as file:
        try:
            parquet = ParquetFile(file, metadata=listed.metadata)
            return parquet.read_row_group(group, columns=[column]).column(column)
        except (OSError, ArrowInvalid) as error:
            if file.fault:
                raise file.fault from None
            raise Refused("decoder_error", f"its row group cannot be decoded: {type(error).__name__}") from error


@lru_cache(maxsize=64)
def _starts(root: str, path: str) -> list[int]:
    """Number of the first row of each row group."""
    metadata, starts = _parquet(root, path).metadata, [0]
    for group in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


@lru_cache(maxsize=8)
def _parquet(root: str, path: str) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    folder = Folder(root)
    return ParquetFile(folder.filesystem.open_input_file(f"{folder.path}/{path}"))


SOURCE = HuggingFace()
