"""The large mix: thirteen public chest X-ray sets below one root, each in a folder of its `data=` name.

data.root holds nih-cxr14/, chexpert/, …, each in its owner's layout; data.sets takes some of them. The owners hand out
1,090,398 images in all. Of these what cannot be decoded and what is there twice goes to quarantine (COVIDx CXR-4, of
84,818 images, is largely made of others), which leaves more than 868,000. The filter behind that number in
Dino-Diffusion (arXiv:2407.11594) is unpublished; this one is ours. data.frontal=true keeps frontal views only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import UserError
from pipelines.data.files import fair_draw
from pipelines.data.settings import Data
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded
    from pipelines.data.public_set import Published

T = TypeVar("T")

SETS = ("nih-cxr14", "chexpert", "mimic-cxr-jpg", "padchest", "bimcv-covid19", "vindr-cxr", "vindr-pcxr", "brax",
        "covidx-cxr4", "kermany", "jsrt", "montgomery", "shenzhen")


class Mix:
    """Several sets as one; a patient of one is no patient of another."""

    def manifest(self, settings: Data, seed: int) -> pa.Table:
        """All rows of all sets, each listed and made a table of its own.

        Raises:
            UserError: a set is not there or only half there; the message tells of all of them, and who hands them out.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        def listed(name: str, source: Published, part: Data) -> pa.Table:
            table = source.manifest(replace(part, images=None), seed)
            say(f"{name}: {table.num_rows:,} images")
            patients = pc.binary_join_element_wise(name, table["patient_id"], "/")
            return table.set_column(table.schema.get_field_index("patient_id"), "patient_id", patients)

        rows = pa.concat_tables(_of_each(settings, listed))
        if settings.images is None:
            return rows
        paths = pc.binary_join_element_wise(rows["source"], rows["path"], "/").to_pylist()
        return rows.take(fair_draw(paths, settings.images))

    def load(self, row: Mapping[str, Any], settings: Data) -> Decoded:
        name = row["source"].replace("_", "-")
        source, part = _part(name, settings)
        return source.load(row, part)


def _of_each(settings: Data, ask: Callable[[str, Published, Data], T]) -> list[T]:
    """What each set that is taken answers; ValueError names all that are not whole."""
    unknown = [name for name in settings.sets or () if name not in SETS]
    if unknown:
        raise UserError(f"data.sets={settings.sets}: {unknown[0]!r} is none of {', '.join(SETS)}")
    answers, missing = [], []
    for name in dict.fromkeys(settings.sets or SETS):
        source, part = _part(name, settings)
        try:
            answers.append(ask(name, source, part))
        except ValueError as error:
            missing.append(f"- {name} ({source.card.sign or 'nothing to sign'}): {error}")
    if missing:
        told = f"{len(missing)} sets of data=cxr-868k are not whole; bring them below data.root, or take others with"
        raise UserError("\n".join([f"{told} data.sets=[…]", *missing]))
    return answers


def _part(name: str, settings: Data) -> tuple[Published, Data]:
    from pipelines.data.sources import find_source

    if not settings.root:
        raise UserError(f"data=cxr-868k needs data.root=PATH, a folder that holds {', '.join(SETS)}")
    module = name.replace("-", "_")
    return find_source(module), replace(settings, source=module, root=f"{settings.root.rstrip('/')}/{name}")  # type: ignore[return-value]


SOURCE = Mix()
