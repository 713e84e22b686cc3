"""Findings in a table of images: names, states, and counts per source."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Folder
from pipelines.data.findings import FINDINGS
from pipelines.tables.parquet import READERS, read_shard

PRESENT, ABSENT, UNKNOWN = 1, 0, -1
STATE_COLUMNS = ("labels", "absent")  # the columns that hold them

Report = dict[str, dict[str, Any]]  # source → `images`, and `findings`: finding → number of images in each state


def present_findings(table: pa.Table) -> list[str]:
    """The findings that are present in at least one image of the table, sorted."""
    return sorted(pc.unique(pc.list_flatten(table["labels"]).drop_null()).to_pylist())


def label_states(table: pa.Table, findings: Sequence[str]) -> np.ndarray:
    """States of `findings` in the columns `labels` and `absent`, int8 (N, len(findings)): 1, 0, or -1 where unknown."""
    states = np.full((table.num_rows, len(findings)), UNKNOWN, np.int8)
    for name, state in (("absent", ABSENT), ("labels", PRESENT)):
        column = table[name].combine_chunks()
        if len(column) and findings:
            index = pc.index_in(pc.list_flatten(column), pa.array(findings, pa.string()))
            known = np.asarray(index.is_valid())
            states[np.asarray(pc.list_parent_indices(column))[known], np.asarray(index.drop_null())] = state
    return states


def label_report(images: Folder) -> Report:
    """Numbers of present, absent and unknown per source and finding; a few shards are in memory at once."""
    total: Counter[str] = Counter()
    stated: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: {name: Counter() for name in STATE_COLUMNS})
    with ThreadPoolExecutor(READERS) as pool:
        for images_of, findings_of in pool.map(lambda name: _count(images, name), images.names(".parquet")):
            total.update(images_of)
            for (source, column), counts in findings_of.items():
                stated[source][column].update(counts)
    order = {finding: k for k, finding in enumerate(FINDINGS)}
    return {source: {"images": n, "findings": {
        finding: {"present": stated[source]["labels"][finding], "absent": stated[source]["absent"][finding],
                  "unknown": n - stated[source]["labels"][finding] - stated[source]["absent"][finding]}
        for finding in sorted({*stated[source]["labels"], *stated[source]["absent"]},
                              key=lambda finding: (order.get(finding, len(order)), finding))}}
        for source, n in sorted(total.items())}


def _count(images: Folder, shard: str) -> tuple[Counter[str], dict[tuple[str, str], Counter[str]]]:
    """Of one shard: images per source, and per source and column the images of each finding."""
    table = read_shard(images, shard, ["source", *STATE_COLUMNS])
    found = {}
    for source in pc.unique(table["source"]).to_pylist():
        part = table.filter(pc.field("source") == source)
        for column in STATE_COLUMNS:
            counts = pc.value_counts(pc.list_flatten(part[column].combine_chunks()))
            found[source, column] = Counter({row["values"]: row["counts"] for row in counts.to_pylist()})
    return Counter(table["source"].to_pylist()), found


def present(report: Report) -> dict[str, int]:
    """Number of images in which each finding is present, over all sources, most frequent first."""
    total: Counter[str] = Counter()
    for source in report.values():
        total.update({finding: counts["present"] for finding, counts in source["findings"].items()})
    return {finding: n for finding, n in total.most_common() if n}


def label_lines(report: Mapping[str, Any], most: int = 12) -> list[str]:
    """A label report as lines of text, with the `most` frequent findings of each source."""
    lines = []
    for source, counts in report.items():
        findings = sorted(counts["findings"].items(), key=lambda item: -item[1]["present"])
        lines.append(f"{source:<32} {'present':>9} {'absent':>9} {'unknown':>9}   of {counts['images']:,} images"
                     if findings else f"{source}: {counts['images']:,} images without labels")
        lines += [f"  {finding:<30} {states['present']:>9,} {states['absent']:>9,} {states['unknown']:>9,}"
                  for finding, states in findings[:most]]
        lines += [f"  and {len(findings) - most} more findings (stage.json)"] if len(findings) > most else []
    return lines
