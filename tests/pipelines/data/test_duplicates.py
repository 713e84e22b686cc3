import itertools
import time
import tracemalloc

import numpy as np
import pyarrow as pa

from pipelines.data.deduplicate import decide
from pipelines.data.duplicates import duplicate_groups, near_pairs
from pipelines.data.settings import DataSettings


def hashes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def flipped(row: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """The hash with so many of its bits changed."""
    all_bits = np.unpackbits(row)
    all_bits[np.random.default_rng(seed).choice(256, bits, replace=False)] ^= 1
    return np.packbits(all_bits)


def test_pairs_within_the_radius_are_found_and_no_others():
    table = hashes(400)
    for k in range(40):  # rows 200 + k are copies of rows k, 0 to 19 bits away
        table[200 + k] = flipped(table[k], k // 2, k)
    found = {tuple(sorted(pair)) for left, right in near_pairs(table, 10)
             for pair in zip(left.tolist(), right.tolist(), strict=True)}
    brute = {(a, b) for a, b in itertools.combinations(range(400), 2)
             if np.bitwise_count(table[a] ^ table[b]).sum() <= 10}
    assert found == brute == {(k, 200 + k) for k in range(40) if k // 2 <= 10}


def test_groups_join_equal_contents_and_near_pictures():
    table = hashes(6)
    table[3] = flipped(table[0], 4, 1)
    ids = ["a", "b", "c", "d", "b", "e"]  # rows 1 and 4 are one file
    found = duplicate_groups(ids, table, 8)
    assert found[0] == found[3]
    assert found[1] == found[4]
    assert len(set(found.tolist())) == 4
    assert len(set(duplicate_groups(ids, table, None).tolist())) == 5
    assert duplicate_groups([], None, 8).tolist() == []


def test_many_alike_cost_no_all_pairs_loop():
    """A thousandth of the bits vary, so that all rows share most bands: time and memory stay linear."""
    table = np.repeat(hashes(1), 20_000, axis=0)
    table[:, :2] = hashes(20_000, 1)[:, :2]
    tracemalloc.start()
    start = time.perf_counter()
    found = duplicate_groups([str(k) for k in range(20_000)], table, 10)
    assert time.perf_counter() - start < 60
    assert tracemalloc.get_traced_memory()[1] < 1 << 30
    tracemalloc.stop()
    assert len(set(found.tolist())) < 20, "all are within a few bits of another"


def test_of_copies_the_labelled_one_stays_and_takes_the_most_held_out_split():
    """As in a mix of a set with labels and one without: in whatever order they come."""
    rows = [{"row": k, "uri": f"{k}", "sha256": digest, "split": split, "patient_id": f"p{k}", "phash": bytes(32),
             "labels": labels, "absent": [], "structures": []} for k, (digest, split, labels) in enumerate(
                 [("a", "test", []), ("a", "train", ["Edema"]), ("b", "val", []), ("b", "train", [])])]
    decided = decide(pa.Table.from_pylist(rows), DataSettings(near_duplicates=None)).to_pylist()
    assert [(row["row"], row["split"]) for row in decided] == [(0, None), (1, "test"), (3, None)]


def test_of_equally_labelled_copies_the_one_with_a_mask_stays():
    rows = [{"row": k, "uri": f"{k}", "sha256": "a", "split": "train", "patient_id": f"p{k}", "phash": bytes(32),
             "labels": ["Edema"], "absent": [], "structures": outlined} for k, outlined in enumerate([[], ["heart"]])]
    decided = decide(pa.Table.from_pylist(rows), DataSettings(near_duplicates=None)).to_pylist()
    assert [(row["row"], row["split"]) for row in decided] == [(0, None)]
