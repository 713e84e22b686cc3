"""A user's own set, described by a YAML file: which table lists its images, what its columns mean, whose it is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cluster.errors import SetMistake, UserError
from cluster.storage import Folder, absolute
from pipelines.data.files import connect
from pipelines.data.public_set import Card
from pipelines.data.structures import STRUCTURES
from pipelines.graph.fields import check_choices, require, schema

SUFFIXES = (".yaml", ".yml")
BOOLEANS = {True: ["true", "yes", "on"], False: ["false", "no", "off"]}  # what YAML takes for one


@dataclass
class OwnSet:
    """Columns that are not named have the name of their field, or are not there."""

    table: str = ""
    """CSV, TSV or Parquet with a row per image (or per study); relative to the YAML file, absolute, or a URI."""
    images: str | None = None
    """Folder that paths are relative to, and that is searched for DICOM files; null: the table's own."""
    key: str | None = None
    """Column that names the image; null: uri, else path."""
    key_is: Literal["path", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID"] = "path"
    """What the key names: a file, or what the headers of DICOM files hold."""
    patient: str = "patient_id"
    """Column of the patient; of DICOM files found by their headers it is PatientID unless a column is named here."""
    study: str = "study_id"
    """Column of the study."""
    view: str = "view"
    """Column of the view: PA, AP, LATERAL."""
    split: str = "split"
    """Column of the owner's split."""
    splits: dict[str, str] = field(default_factory=dict)
    """Values of that column as train, val or test."""
    labels: str = "labels"
    """Column of findings that are present, a list or joined."""
    absent: str = "absent"
    """Column of findings that are absent; where there is none, labelled rows were read for all labels of the table."""
    uncertain: str = "uncertain"
    """Column of findings that are mentioned and neither stated nor denied."""
    separator: str = "|"
    """What joins findings in a cell."""
    label_columns: list[str] = field(default_factory=list)
    """Columns of one finding each, in place of the joined ones."""
    present_values: list[str] = field(default_factory=lambda: ["1", "1.0", "true", "yes", "positive"])
    """Cells of label_columns that state the finding, whatever their case."""
    absent_values: list[str] = field(default_factory=lambda: ["0", "0.0", "false", "no", "negative"])
    """Cells that deny it."""
    uncertain_values: list[str] = field(default_factory=lambda: ["-1", "-1.0", "uncertain"])
    """Cells that leave it open, as a blank one does."""
    spellings: dict[str, str] = field(default_factory=dict)
    """Own words for findings, and the finding that each means."""
    masks: dict[str, str] = field(default_factory=lambda: {"mask": "mask"})
    """Structures, and the column of the path of the mask of each."""
    title: str = "own list"
    """What the set is called on cards."""
    licence: str = "its owner's"
    """What may be done with it."""
    citation: str = ""
    """What to cite."""
    sign: str | None = None
    """What a user must sign, if anything."""

    def check(self, where: str) -> None:
        """Raise UserError naming the file and the key that is wrong."""
        check_choices(where, self)
        require(bool(self.table), f"{where}.table", self.table, "must name a CSV, TSV or Parquet file")
        require(self.key_is == "path" or bool(self.key), f"{where}.key", self.key, f"must name {self.key_is}'s column")
        for structure in self.masks:
            require(structure in STRUCTURES, f"{where}.masks", structure, f"must be one of {', '.join(STRUCTURES)}")
        for part in self.splits.values():
            require(part in ("train", "val", "test"), f"{where}.splits", part, "must be train, val or test")

    @property
    def card(self) -> Card:
        return Card(self.title, 0, "its owner", self.licence, self.citation, self.sign, tuple(self.masks))

    def folder(self) -> str:
        return self.images or self.table.rpartition("/")[0]


DEFAULTS = {item.name: item.default for item in fields(OwnSet)}


def read_set(root: str) -> OwnSet:
    """The description at `root`, with absolute paths; a table there is one whose columns have the usual names.

    Raises:
        SetMistake: it is no such description.
        UserError: it cannot be read.
    """
    root = Folder(root).uri
    if not root.lower().endswith(SUFFIXES):
        return OwnSet(table=root)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from pipelines.graph.overrides import suggestion

    base = root.rpartition("/")[0]
    try:
        given: Any = OmegaConf.to_container(OmegaConf.create(decoded(read_bytes(root), root)))
        if unknown := set(given) - set(DEFAULTS):
            key = min(unknown)
            raise SetMistake(f"{root}: unknown key {key!r}; {suggestion(str(key), DEFAULTS)}")
        if "masks" in given:  # the mapping that is given replaces the usual one
            given["masks"] = masks = given["masks"] or {}
            if not isinstance(masks, dict) or not all(isinstance(column, str) for column in masks.values()):
                raise SetMistake(f"{root}.masks={masks!r}: must have a column for each structure, as in "
                                 "{left_lung: LungMask}")
        given |= _texts(given)
        values: Any = OmegaConf.to_container(OmegaConf.merge(
            OmegaConf.structured(schema(OwnSet)), {key: value for key, value in given.items() if key != "masks"}))
    except (OmegaConfBaseException, YAMLError, TypeError, AttributeError) as error:
        raise SetMistake(f"{root} describes no set: {' '.join(str(error).split())}") from error
    found = OwnSet(**values | ({"masks": given["masks"]} if "masks" in given else {}))
    try:
        found.check(root)
    except UserError as error:
        raise SetMistake(str(error)) from error
    found.table = within(base, found.table)
    found.images = found.images and absolute(within(base, found.images))
    return found


def _texts(given: dict[str, Any]) -> dict[str, Any]:
    """The cells that a description names as a table may have them: YAML reads yes, no and numbers otherwise."""
    cells = {key: [cell for value in given[key] for cell in (BOOLEANS[value] if isinstance(value, bool) else [value])]
             for key in ("present_values", "absent_values", "uncertain_values") if isinstance(given.get(key), list)}
    return cells | {key: {str(cell): meant for cell, meant in given[key].items()}
                    for key in ("splits", "spellings") if isinstance(given.get(key), dict)}


def within(base: str, path: str) -> str:
    """A path or URI, relative to `base` where it is relative."""
    return path if "://" in path or path.startswith("/") else f"{base}/{path}"


def decoded(content: bytes, uri: str) -> str:
    """The text of a file.  Raises SetMistake where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SetMistake(f"{uri} is not UTF-8; save it as UTF-8") from error


def read_bytes(uri: str) -> bytes:
    """The file.  Raises UserError where it cannot be read."""
    folder, _, name = uri.rpartition("/")
    try:
        return connect(folder).read(name)
    except OSError as error:
        raise UserError(f"{uri!r} cannot be read: {error}; data=manifest needs a CSV, TSV or Parquet file, or a YAML "
                        "file that describes one") from error
