"""What all published data sets have in common: files below `data.root`, tables beside them, a card that says whose.

A module of `sources` describes one set with a `Card` and a function `images(tree, settings)` that yields one
`ListedImage` per file, from the owner's layout and tables. `PublicSet` makes a source of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from cluster.errors import UserError
from cluster.faults import with_retries
from pipelines.data.files import IMAGE_SUFFIXES, connect, listing, manifest_table, read_image
from pipelines.data.findings import finding_columns
from pipelines.data.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.storage import Folder
    from pipelines.data.image.decode import Decoded
    from pipelines.data.image.picture import GrayImage

TRAIN_ONLY = "train only"
"""Split of an image of the owner's test part whose labels are not given out, which would test nothing: train, unless
its patient is held out for another image."""

@dataclass(frozen=True)
class Card:
    """Whose a set is and how to come by it."""

    title: str
    images: int  # that the owner hands out
    where: str  # the owner's page
    licence: str
    citation: str
    sign: str | None = None  # what a user must sign or be trained in, if anything
    masks: tuple[str, ...] = ()  # of pipelines.data.structures, those that it outlines
    assesses: tuple[str, ...] = ()  # findings that every labelled image was read for: absent where not stated


@dataclass(frozen=True)
class ListedMask:
    """One structure's mask: an image file whose bright pixels are the structure, or run lengths."""

    name: str  # one of the card's
    path: str | None = None  # relative to the root
    rle: str | None = None  # the owner's run-length text, where there is no file; "" where the structure is not there


@dataclass(frozen=True)
class ListedImage:
    """One picture as its owner describes it; what is unknown is None or left out."""

    path: str  # relative to the root
    patient: str | None = None  # None: the set tells nothing, and each image counts as a patient of its own
    study: str | None = None
    view: str | None = None  # PA, AP, LATERAL, or another name of the owner's
    labels: Iterable[str] = ()  # stated as present
    absent: Iterable[str] = ()  # stated as absent, beside what the card assesses
    uncertain: Iterable[str] = ()  # mentioned, but neither stated nor denied
    labelled: bool = True  # whether the card's assessment holds for it
    split: str | None = None  # train, val or test, where the owner has an official one; TRAIN_ONLY
    masks: tuple[ListedMask, ...] = ()
    inverted: bool = False  # air is bright in the file, and the file itself does not say so
    people: str | None = None  # the source whose name for the patient it is, where that is another one
    refused: str | None = None  # a reason of `image.picture.NOT_WANTED` that is known without reading the file


class Findings(TypedDict, total=False):
    """What a row of a label table says: these fields of a `ListedImage`."""

    labels: list[str]
    absent: list[str]
    uncertain: list[str]
    labelled: bool


class Tree:
    """The files and tables below one root, listed once."""

    def __init__(self, root: str, card: Card) -> None:
        self.root, self.card, self.folder = root, card, connect(root)

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file that is not hidden, by path relative to the root, in order of path.

        Raises:
            UserError: the root is not there, or not readable.
        """
        try:
            return listing(self.root)
        except ValueError as error:
            raise UserError(f"{error} ({self.card.title} is given out at {self.card.where})") from error

    @cached_property
    def pictures(self) -> list[str]:
        """Paths of all image files."""
        return [path for path in self.files if path.lower().endswith(IMAGE_SUFFIXES)]

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Path of every image file by its name, for sets whose tables name files and not folders."""
        return {path.rsplit("/", 1)[-1]: path for path in self.pictures}

    def find(self, *names: str) -> str:
        """The path of the first file, wherever below the root, that has one of these names (or ends of paths).

        Raises:
            UserError: there is none; the message says where the owner gives the set out.
        """
        for name in names:
            for path in self.files:
                if path == name or path.endswith("/" + name):
                    return path
        raise self.missing(" or ".join(names))

    def has(self, *names: str) -> bool:
        """Whether `find` would find one of these, for tables that not every release of a set has."""
        return any(path == name or path.endswith("/" + name) for name in names for path in self.files)

    def table(self, *names: str, **options: Any) -> Iterator[dict[str, str]]:
        """Rows of the first of these CSV files (gzip or not) that is there, each a dict of texts; blanks are "".

        Raises:
            StorageUnavailable: it cannot be read.
            UserError: there is none, or it is no table.
        """
        from pyarrow import ArrowInvalid

        path = self.find(*names)
        try:
            content = with_retries(lambda: self.folder.read(path), f"{self.root}/{path}")
            table = read_csv(content, gzipped=path.endswith(".gz"), **options)
        except ArrowInvalid as error:
            raise UserError(f"{self.root}/{path} is no table: {error}") from error
        for batch in table.to_batches():
            yield from batch.to_pylist()

    def column(self, row: dict[str, str], name: str, table: str) -> str:
        """A cell.  Raises UserError naming the column where the owner's table has it not."""
        if name not in row:
            raise UserError(f"{self.root}: {table} has no column {name!r}; it has {', '.join(row)}")
        return row[name]

    def missing(self, what: str) -> UserError:
        return UserError(f"data.root={self.root!r} holds no {what} of {self.card.title}, which is given out at "
                          f"{self.card.where}")


def read_csv(content: bytes, *, gzipped: bool = False, delimiter: str = ",") -> pa.Table:
    """A CSV file with every column as text."""
    import gzip

    import pyarrow as pa
    from pyarrow import csv

    packed = gzipped and content[:2] == b"\x1f\x8b"  # pyarrow's input stream has unpacked what is called .gz
    content = gzip.decompress(content) if packed else content
    names = csv.open_csv(pa.BufferReader(content), parse_options=_parse(delimiter)).schema.names  # its first block
    return csv.read_csv(
        pa.BufferReader(content),
        parse_options=_parse(delimiter),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )


def _parse(delimiter: str) -> Any:
    from pyarrow import csv

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


class PublicSet:
    """A source made of a card, a function that reads the owner's layout, and a reader of the owner's own format."""

    def __init__(self, card: Card, images: Callable[[Tree, DataSettings], Iterable[ListedImage]],
                 read: Callable[[bytes, DataSettings], GrayImage] | None = None) -> None:
        self.card, self._images, self._read = card, images, read
        self.name = images.__module__.rsplit(".", 1)[-1]

    def manifest(self, settings: DataSettings, seed: int) -> pa.Table:
        """One row per image that is there.

        Raises:
            UserError: the set is not there, or only its tables are.
        """
        tree = self._tree(settings)
        table = manifest_table(self._rows(tree, settings)).sort_by("path")
        if not table.num_rows:
            raise tree.missing("image")
        return table

    def _rows(self, tree: Tree, settings: DataSettings) -> Iterator[dict[str, Any]]:
        """Rows of the manifest, in the order of the owner's list, which may name a file twice: the first counts."""
        seen: set[str] = set()
        for image in self._images(tree, settings):
            if image.path in tree.files and image.path not in seen:
                seen.add(image.path)
                yield self._row(tree, image)

    def load(self, row: Mapping[str, Any], settings: DataSettings, **options: Any) -> Decoded:
        root = self._root(settings)
        options = {"inverted": bool(row.get("inverted")), "read": self._read, **options}
        return read_image(root, row["path"], row, settings, **options)

    def _row(self, tree: Tree, image: ListedImage) -> dict[str, Any]:
        return {
            "source": self.name, "uri": f"{tree.root}/{image.path}", "path": image.path,
            "patient_id": image.patient or image.path, "people": image.people, "study_id": image.study,
            "view": image.view,
            **finding_columns(self.name, image.labels, image.uncertain, image.absent,
                     self.card.assesses if image.labelled else ()), "split": image.split,
            "masks": [{"name": m.name, "path": m.path, "rle": m.rle} for m in image.masks],
            "inverted": image.inverted, "refused": image.refused,
            "bytes": sum(tree.files.get(path, 0) for path in (image.path, *(m.path for m in image.masks)) if path),
        }

    def _root(self, settings: DataSettings) -> str:
        if not settings.root:
            raise UserError(f"data={self.name.replace('_', '-')} needs data.root=PATH; {self.card.title} is given out "
                             f"at {self.card.where}" + (f" ({self.card.sign})" if self.card.sign else ""))
        return settings.root.rstrip("/")

    def _tree(self, settings: DataSettings) -> Tree:
        return Tree(self._root(settings), self.card)


class HeaderSet(PublicSet):
    """A source whose files tell of themselves, in a header each, what a table does elsewhere.

    Args:
        card: whose it is.
        images: lists the files.
        header: of a folder, a path in it and the settings: what the file's header says, None where it is no image.
    """

    def __init__(self, card: Card, images: Callable[[Tree, DataSettings], Iterable[ListedImage]],
                 header: Callable[[Folder, str, DataSettings], ListedImage | None]) -> None:
        super().__init__(card, images)
        self._header = header

    def _row(self, tree: Tree, image: ListedImage) -> dict[str, Any]:
        return super()._row(tree, image) | {"patient_id": None}

    def describe(self, row: Mapping[str, Any], settings: DataSettings) -> dict[str, Any] | None:
        """The row with what the header says, None where the file is no image.

        Raises:
            StorageUnavailable: it cannot be read from this node.
        """
        root, path = self._root(settings), row["path"]
        image = with_retries(lambda: self._header(connect(root), path, settings), f"{root}/{path}")
        if image is None:
            return None
        return {**row, "patient_id": image.patient or path, "study_id": image.study, "view": image.view,
                "refused": image.refused, "inverted": image.inverted}
