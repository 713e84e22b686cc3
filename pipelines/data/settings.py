"""Settings of the data: where images come from, and what they become."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from omegaconf import MISSING

from cluster.errors import UserError
from cluster.storage import absolute, overlaps
from pipelines.graph.fields import execution, fraction, positive, require
from pipelines.graph.settings import refuse_password

OF_A_SET = ("source", "root", "subset", "patient_regex", "images")
"""What each set of a mix may set for itself."""


def _without_roots(sets: Any) -> Any:
    """The sets of a mix but for where they lie: moving them changes nothing."""
    if not isinstance(sets, dict):
        return sets
    return {name: {key: value for key, value in (own or {}).items() if key != "root"} for name, own in sets.items()}


@dataclass
class DataSettings:
    """Source of the images, cleaning, splits."""

    source: str = MISSING
    """Module of pipelines.data.sources that reads the data set."""
    root: str | None = execution(None)
    """Folder of the images, or its URI; moving it makes nothing stale."""
    subset: str | None = None
    """Which subset to read, for sources with several (medmnist, configurations of huggingface)."""
    size: int = 64
    """Side of the square images, in pixels."""
    images: int | None = None
    """Number of images to use, sampled by a hash of their paths; null: all. Required for the phantom."""
    patient_regex: str | None = None
    """Regular expression on the relative path; its groups (or the whole match) identify the patient."""
    sets: Any = field(default=None, metadata={"outcome": _without_roots})
    """data=mix: the sets to combine, as a list of folder names below data.root, as a mapping from name to source, root,
    subset, patient_regex and images, or as a YAML file with that mapping; null: all sets of the mix."""
    deduplicate: bool = True
    """Move duplicate images to quarantine."""
    near_duplicates: int | None = 10
    """Images whose 256-bit perceptual hashes differ in at most this many bits are duplicates; null: only identical
    files."""
    frontal: bool = False
    """Keep only frontal views, by the metadata of the set or else by aspect ratio and symmetry."""
    chest_only: bool = True
    """Skip DICOM files whose header names a body part other than the chest; files without one are kept."""
    crop_border: bool = True
    """Crop uniform borders: collimation, frames, padding."""
    fit: Literal["crop", "pad"] = "crop"
    """crop: the centre square; pad: the whole image on black."""
    erase_text: bool = False
    """Paint over bright text and lead markers near the edges with the surrounding gray."""
    val_fraction: float = 0.1
    """Fraction of patients in val, if the source has no split of its own."""
    test_fraction: float = 0.1
    """Fraction of patients in test, if the source has no split of its own."""
    min_side: int = 16
    """Images with a shorter side than this, in pixels, go to quarantine."""
    max_pixels: int = 200_000_000
    """Images with more pixels than this (decompression bombs) go to quarantine."""
    max_bad_fraction: float = execution(0.2)
    """A larger fraction of bad images stops the run."""
    shard_rows: int = 512
    """Images per file of a table."""

    def resolve_paths(self) -> None:
        """Make local roots absolute, so that they mean the same in every process of a cluster."""
        self.root, base = _resolved(self.source, self.root), ""
        if isinstance(self.sets, str):
            base = os.path.dirname(absolute(self.sets))
            self.sets = _read_sets(self.sets)
        if isinstance(self.sets, dict):
            self.sets = {name: {**own, "root": _resolved(own.get("source", name), own["root"], base)}
                         if isinstance(own, dict) and own.get("root") else own for name, own in self.sets.items()}

    @property
    def roots(self) -> list[tuple[str, str]]:
        """Each root that is given, of a mix those of its sets too, and the source that reads it: (source, root)."""
        own = self.sets if isinstance(self.sets, dict) else {}
        given = [(self.source, self.root), *((options.get("source", name), options.get("root"))
                                             for name, options in own.items() if options)]
        return [(source, root) for source, root in given if root]

    def check(self) -> None:
        positive("data", self, "images", "min_side", "max_pixels", "shard_rows")
        fraction("data", self, "val_fraction", "test_fraction", "max_bad_fraction")
        _check_sets(self.sets)
        for _, root in self.roots:
            refuse_password("data.root", root)
        require(self.near_duplicates is None or 0 <= self.near_duplicates <= 16, "data.near_duplicates",
                self.near_duplicates, "must be between 0 and 16 (bits), or null")
        require(16 <= self.size <= 2048 and self.size % 4 == 0, "data.size", self.size,
                "must be a multiple of 4 from 16 to 2048 (pixels)")
        require(self.val_fraction + self.test_fraction < 1, "data.val_fraction + data.test_fraction",
                self.val_fraction + self.test_fraction, "must leave patients to train on (below 1)")
        if self.patient_regex is not None:
            try:
                re.compile(self.patient_regex)
            except re.error as error:
                raise UserError(f"data.patient_regex={self.patient_regex!r} is no regular expression: {error}") \
                    from error

    def check_with(self, settings: Any) -> None:
        """Raise UserError if results would be stored among the raw images, or the other way round."""
        run = f"{settings.storage}/{settings.name}"
        for source, root in self.roots:
            folder = _raw_folder(source, root)
            if overlaps(run, folder):
                images = "" if folder == root else f", whose images lie in {folder!r},"
                raise UserError(f"data.root={root!r}{images} and the results in {run!r} overlap; choose another "
                                "storage= or name=")


def _raw_folder(source: str, root: str) -> str:
    """Where the images lie; the root itself where only a file says so that is not on this disk, or is wrong."""
    from pipelines.data.sources import raw_folder

    if not os.path.isfile(root):
        return root
    try:
        return raw_folder(source, root)
    except UserError:  # raised again when the set is listed
        return root


def _resolved(source: str | None, root: str | None, base: str = "") -> str | None:
    if not root or "://" in root:
        return root
    path = os.path.join(base, os.path.expanduser(root))
    if source == "huggingface" and not os.path.isdir(path):  # it may be OWNER/NAME of the Hub
        return root
    return absolute(path)


def _read_sets(path: str) -> Any:
    try:
        with open(path) as file:
            return yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"data.sets={path!r} is no YAML file that can be read: {error}") from error


def _check_sets(sets: Any) -> None:
    """Raise UserError where the sets of a mix are neither names, nor names with options."""
    require(sets is None or isinstance(sets, list | dict), "data.sets", sets,
            "must be names, or a source, a root and options for each name")
    seen: dict[str, str] = {}
    for name, own in (sets.items() if isinstance(sets, dict) else ((name, None) for name in sets or ())):
        require(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None, "data.sets", name,
                "a name is letters, digits, '_' and '-'")
        same = seen.setdefault(name.replace("-", "_"), name)
        require(same == name, "data.sets", name, f"is the same name as {same!r}; - and _ count alike")
        require(own is None or isinstance(own, dict), f"data.sets.{name}", own,
                f"must be some of {', '.join(OF_A_SET)}")
        for key in own or ():
            require(key in OF_A_SET, f"data.sets.{name}", key, f"must be one of {', '.join(OF_A_SET)}")
