import itertools
from collections import Counter

import pyarrow as pa
import pytest

from pipelines.data import split
from pipelines.graph.compose import load_settings
from pipelines.tables.schemas import MANIFEST


@pytest.fixture
def settings():
    return load_settings().data


def table_of(rows):
    """Rows of the manifest, with the patients' places."""
    return pa.Table.from_pylist(rows, schema=MANIFEST).append_column(
        "bucket", [[split.split_bucket(row["patient_id"]) for row in rows]])


def manifest(rows):
    """One image per (patient, split) pair."""
    return table_of([
        {"source": "folder", "uri": f"/x/{k}.png", "path": f"{k}.png", "patient_id": patient, "labels": [],
         "split": official}
        for k, (patient, official) in enumerate(rows)
    ])


def assigned(rows, settings):
    """Split by patient, in the caller's own names."""
    table = split.assign(manifest(rows), settings)
    found: dict[str, set[str]] = {}
    for (patient, _), name in zip(rows, table["split"].to_pylist(), strict=True):
        found.setdefault(patient, set()).add(name)
    assert all(len(names) == 1 for names in found.values()), "a patient is in two splits"
    return {patient: names.pop() for patient, names in found.items()}


def people(n, images=1, official=None):
    return [(f"patient {k}", official) for k in range(n) for _ in range(images)]


def test_shares_are_of_patients_and_no_patient_is_torn(settings):
    count = Counter(assigned(people(2000, images=2), settings).values())
    assert count["test"] == pytest.approx(200, abs=50)
    assert count["val"] == pytest.approx(200, abs=50)


@pytest.mark.parametrize(("val", "test"), [(0.6, 0.1), (0.1, 0.6), (0.45, 0.45)])
def test_large_shares_are_kept_too(settings, val, test):
    settings.val_fraction, settings.test_fraction = val, test
    count = Counter(assigned(people(2000), settings).values())
    assert count["val"] == pytest.approx(2000 * val, abs=80)
    assert count["test"] == pytest.approx(2000 * test, abs=80)


def test_patients_stay_where_they_are_when_others_come(settings):
    before, after = assigned(people(300), settings), assigned(people(900)[::-1], settings)
    assert all(after[patient] == name for patient, name in before.items())


def test_the_sources_own_split_is_kept(settings):
    rows = [(f"{name}{k}", name) for name in ("train", "val", "test") for k in range(20)]
    assert assigned(rows, settings) == {patient: official for patient, official in rows}


@pytest.mark.parametrize(("splits", "expected"), [
    (("train", "val"), "val"), (("val", "test"), "test"), (("test", "train"), "test"), (("val", None), "val"),
])
def test_a_torn_patient_goes_to_the_most_held_out_split(settings, splits, expected):
    rest = [(f"{name}{k}", name) for name in ("train", "val", "test") for k in range(5)]
    assert assigned([*rest, *(("torn", name) for name in splits)], settings)["torn"] == expected


def test_a_missing_val_is_carved_from_train_only(settings):
    rows = [(f"{name}{k}", name) for name in ("train", "test") for k in range(300)]
    found = assigned(rows, settings)
    assert all(found[patient] == "test" for patient, official in rows if official == "test")
    count = Counter(found.values())
    assert 10 < count["val"] < 60
    assert count["test"] == 300


def test_images_outside_the_sources_split_train(settings):
    rows = [*((f"{name}{k}", name) for name in ("val", "test") for k in range(5)), *people(20)]
    assert {assigned(rows, settings)[patient] for patient, _ in people(20)} == {"train"}


@pytest.mark.parametrize("n", [3, 4, 5, 10])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_few_patients_fill_every_split(settings, n, share):
    """Whatever they are called: with few of them all may hash into one split's stretch."""
    settings.val_fraction = settings.test_fraction = share
    for trial in range(60):
        found = assigned([(f"{trial}/{k}", None) for k in range(n)], settings)
        assert set(found.values()) == {"train", "val", "test"}


def test_two_official_train_patients_give_one_to_val(settings):
    for trial in range(40):
        found = assigned([(f"{trial}a", "train"), (f"{trial}b", "train"), ("t", "test")], settings)
        assert Counter(found.values()) == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_patients_are_refused(settings, n):
    settings.root = "/some/where"
    with pytest.raises(ValueError, match="/some/where"):
        split.assign(manifest(people(n, images=5)), settings)


def test_all_other_columns_stay(settings):
    before = manifest(people(10))
    after = split.assign(before, settings)
    assert after.schema.equals(MANIFEST)
    for name in set(MANIFEST.names) - {"split"}:
        assert after[name].equals(before[name])


def test_the_split_does_not_depend_on_the_order_of_rows(settings):
    rows = people(5)
    first = assigned(rows, settings)
    assert all(assigned(list(order), settings) == first for order in itertools.permutations(rows))


def test_images_of_the_owners_unlabelled_test_part_are_drawn_into_neither_val_nor_test(settings):
    """As in RSNA: all labelled images are train, and some people have images in both parts."""
    rows = [(f"labelled {k}", "train") for k in range(300)]
    rows += [(f"unlabelled {k}", split.TRAIN_ONLY) for k in range(300)]
    rows += [(f"both {k}", name) for k in range(300) for name in ("train", split.TRAIN_ONLY)]
    found = assigned(rows, settings)
    assert {name for patient, name in found.items() if patient.startswith("unlabelled")} == {"train"}
    for kind in ("labelled", "both"):
        count = Counter(name for patient, name in found.items() if patient.startswith(kind))
        assert count["test"] > 10
        assert count["val"] > 10, "a person is held out with all images"


def test_of_a_mix_each_set_is_split_by_itself(settings):
    """One has an official test, one has none, one is too small to be split."""
    rows = [("official", f"a{k}", "test" if k < 5 else "train") for k in range(200)]
    rows += [("free", f"b{k}", None) for k in range(200)] + [("small", "c", None)]
    table = split.assign(table_of([
        {"source": source, "uri": f"/x/{patient}", "path": patient, "patient_id": patient, "labels": [], "split": name}
        for source, patient, name in rows]), settings)
    count = Counter(zip(table["source"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert count["official", "test"] == 5
    assert count["official", "val"] > 5
    assert count["free", "test"] > 5
    assert count["free", "val"] > 5
    assert count["small", "train"] == 1
