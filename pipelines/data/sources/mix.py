"""Several sets as one: `data.sets` names them, each with a source, a root and options of its own.

    data=mix 'data.sets={kermany: {root: /data/kermany}, ours: {source: manifest, root: /data/ours.yaml}}'

A set is read by the source of its name unless it says `source`, and lies in `data.root/NAME` unless it says `root`; it
may set `subset`, `patient_regex` and `images` (how many of it), too. A patient of one set is no patient of another,
unless a set's tables tell whose name for the patient it is: RSNA's, SIIM's and COVIDx's films are other sets' films.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from cluster.errors import SetMistake, UserError
from pipelines.data.files import draw_by_path_hash
from pipelines.data.public_set import Card
from pipelines.data.settings import DataSettings
from pipelines.data.sources import cards_of, check_described, description_hash, find_source, source_name
from pipelines.monitor.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.data.image.decode import Decoded


class Mix:
    """Several sets as one.

    Args:
        config: `data=` name, for messages.
        sets: those that are taken where `data.sets` names none.
    """

    def __init__(self, config: str, sets: tuple[str, ...] = ()) -> None:
        self.config, self.sets = config, sets

    def manifest(self, settings: DataSettings, seed: int) -> pa.Table:
        """All rows of all sets.

        Raises:
            SetMistake: the list of a set is wrong.
            UserError: a set is not there or only half there; the message tells of all of them, and who hands them out.
        """
        import pyarrow as pa

        tables, missing, parts = [], [], dict(self._parts(settings))
        homes = {_column(part.source): name for name, part in parts.items()}
        for name, part in parts.items():
            source = find_source(part.source)
            try:
                table = draw_by_path_hash(source.manifest(part, seed), part.images)
            except SetMistake as error:
                raise SetMistake(f"data.sets.{name}: {error}") from error
            except UserError as error:
                missing.append(f"- {name}{_terms(part)}: {error}")
                continue
            say(f"{name}: {table.num_rows:,} images")
            tables.append(_named(table, name, homes))
        if missing:
            raise UserError("\n".join([f"{len(missing)} sets of data={self.config} are not whole; bring them, or take "
                                       "others with data.sets=[…]", *missing]))
        return pa.concat_tables(tables)

    def describe(self, row: Mapping[str, Any], settings: DataSettings) -> dict[str, Any] | None:
        """As the row's set describes it."""
        name, part = self._part_of(row, settings)
        described = cast(Any, find_source(part.source)).describe(row, part)
        names = {key: f"{name}/{described[key]}" for key in ("patient_id", "alias") if described and described.get(key)}
        return described and described | names | {"source": row["source"]}

    def check_described(self, described: pa.Table, settings: DataSettings) -> None:
        """Those of its sets."""
        import pyarrow.compute as pc

        for name, part in self._parts(settings):
            check_described(described.filter(pc.equal(described["source"], _column(name))), part)

    def description_hash(self, settings: DataSettings) -> str:
        """Those of its sets."""
        return "-".join(filter(None, (description_hash(part) for _, part in self._parts(settings))))

    def load(self, row: Mapping[str, Any], settings: DataSettings) -> Decoded:
        _, part = self._part_of(row, settings)
        return find_source(part.source).load(row, part)

    def cards(self, settings: DataSettings) -> dict[str, Card]:
        return {_column(name): card for name, part in self._parts(settings) for card in cards_of(part).values()}

    def _parts(self, settings: DataSettings) -> Iterator[tuple[str, DataSettings]]:
        """The sets that are taken, and how each is read.  Raises UserError where there is none, or none of a name."""
        chosen = settings.sets or self.sets
        if not chosen:
            raise UserError(f"data={self.config} needs data.sets={{NAME: {{source: SOURCE, root: PATH}}, …}}")
        options = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen)
        for name, own in options.items():
            yield name, self._part(name, own or {}, settings)

    def _part(self, name: str, own: Mapping[str, Any], settings: DataSettings) -> DataSettings:
        source = source_name(own.get("source", name))
        if isinstance(find_source(source), Mix):
            raise UserError(f"data.sets.{name}: {source} is a mix itself; name its sets here")
        root = own.get("root", settings.root and f"{settings.root.rstrip('/')}/{name}")
        taken: dict[str, Any] = {"subset": None, "patient_regex": None, "images": None} | dict(own)
        return replace(settings, **taken | {"source": source, "root": root, "sets": None})

    def _part_of(self, row: Mapping[str, Any], settings: DataSettings) -> tuple[str, DataSettings]:
        return next((name, part) for name, part in self._parts(settings) if _column(name) == row["source"])


def _column(name: str) -> str:
    """The name of a set as the column `source` has it."""
    return name.replace("-", "_")


def _named(table: pa.Table, name: str, homes: Mapping[str, str]) -> pa.Table:
    """The rows under the set's name, with patients of its own, or of the set that their name is from.

    Args:
        table: rows of the set.
        name: of the set.
        homes: names of all sets, by their sources.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    people = table["people"].combine_chunks().dictionary_encode()
    named = [homes.get(_column(source), source.replace("_", "-")) for source in people.dictionary.to_pylist()]
    people = pc.fill_null(pa.array(named, pa.string()).take(people.indices), name)
    patients = pc.binary_join_element_wise(people, table["patient_id"], "/")
    for column, values in (("patient_id", patients), ("source", pa.repeat(_column(name), table.num_rows))):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    return table


def _terms(part: DataSettings) -> str:
    return "".join(f" ({card.sign or 'nothing to sign'})" for card in cards_of(part).values())


SOURCE = Mix("mix")
