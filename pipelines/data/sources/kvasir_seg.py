"""Kvasir-SEG: Kvasir-SEG/images/*.jpg and masks/*.jpg of the same names (and kavsir_bboxes.json, which is not read).

The masks are JPEG, to be cut at 127. The zip has no split: it is that of the owners' train.txt (880 names) and val.txt
(120) where these lie below the root, or that of folders train/images, validation/images, … as in copies.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.public_set import Card, ListedImage, ListedMask, PublicSet, Tree
from pipelines.data.settings import DataSettings
from pipelines.data.sources.folder import SPLIT_NAMES

CARD = Card(
    title="Kvasir-SEG",
    images=1_000,
    where="https://datasets.simula.no/kvasir-seg/ (split: https://github.com/DebeshJha/"
          "2020-MediaEval-Medico-polyp-segmentation)",
    licence="research and education; commercial use by permission of the owners (Simula)",
    citation="Jha et al., Kvasir-SEG: A Segmented Polyp Dataset, MMM 2020, doi:10.1007/978-3-030-37734-2_37",
    masks=("polyp",),
    assesses=("Polyp",),
)


def images(tree: Tree, settings: DataSettings) -> Iterator[ListedImage]:
    """Patients are unknown."""
    return polyps(tree)


def polyps(tree: Tree) -> Iterator[ListedImage]:
    """Every image of a folder `images`, with its namesake in the folder `masks` beside it."""
    listed = dict(_listed(tree))
    seen = set()
    for path in tree.pictures:
        *above, folder, name = ("", *path.split("/"))
        split = SPLIT_NAMES.get(above[-1].lower()) if above else None
        if folder != "images" or (split, name) in seen:
            continue
        seen.add((split, name))
        mask = "/".join((*above[1:], "masks", name))
        yield ListedImage(
            path=path,
            labels=["polyp"],
            split=split or listed.get(name.rsplit(".", 1)[0]),
            masks=(ListedMask("polyp", mask),) if mask in tree.files else (),
        )


def _listed(tree: Tree) -> Iterator[tuple[str, str]]:
    """Names without suffix of the owners' lists, each with its split."""
    for path in tree.files:
        for split in ("train", "val"):
            if path.rsplit("/", 1)[-1] == f"{split}.txt":
                for name in tree.folder.read(path).decode().split():
                    yield name.rsplit("/", 1)[-1].removesuffix(".jpg"), split


SOURCE = PublicSet(CARD, images)
