"""Classes, halves that share none, groups above them, and the balanced order, against lists made by hand."""

import collections
from pathlib import Path

import numpy as np
import pytest
from shards import Letters, members, number_of, options, tar_bytes

from jaxvl.data.balanced import Balanced
from jaxvl.data.stream import eval_batches, open_data, train_batches

TREE = {
    "ant": ["animal", "insect"],
    "bee": ["animal", "insect"],
    "cat": ["animal", "mammal"],
    "oak": ["plant", "tree"],
    "fern": ["plant", "insect"],
}
NAMES = sorted(TREE)  # ant bee cat fern oak


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 samples in two shards; sample n is of class n mod 5, sample 7 of none."""
    folder = tmp_path_factory.mktemp("classes")
    for shard, numbers in enumerate((range(12), range(12, 23))):
        entries = []
        for n in numbers:
            name = NAMES[n % 5]
            fields = {"class": name, "kind": [*TREE[name], name], "code": 100 - n % 5} if n != 7 else {"class": None}
            entries += [m for m in members(n, **fields) if not m[0].endswith(".txt")]
        (folder / f"{shard}.tar").write_bytes(tar_bytes(entries))
    return folder


def opened(folder, **changes):
    given = {"captions": "none", "label": "class", "classes": "all", "max_bad_rate": 0.2, "source": str(folder)} | changes
    return open_data(options(folder=folder, **given))


def seen(dataset):
    batch = next(iter(eval_batches(dataset, None, batch_size=len(dataset))))
    assert batch.arrays["valid"].all()
    return [number_of(p) for p in batch.arrays["image"]], batch.arrays["label"].tolist()


def test_halves_share_no_class_and_labels_are_places(folder):
    whole = opened(folder)
    assert whole.classes == tuple(NAMES) and len(whole) == 22
    assert [(b.key, b.reason) for b in whole.bad] == [("row 7", "unlabelled")]
    numbers, labels = seen(whole)
    assert numbers == [n for n in range(23) if n != 7] and labels == [n % 5 for n in numbers] == whole.table.labels.tolist()
    first, second = opened(folder, classes="first"), opened(folder, classes="second")
    assert (first.classes, second.classes) == (("ant", "bee", "cat"), ("fern", "oak"))
    assert sorted(seen(first)[0] + seen(second)[0]) == numbers
    assert seen(second)[1] == [n % 5 - 3 for n in seen(second)[0]]
    codes = opened(folder, label="code", classes="first")
    assert codes.classes == ("96", "97", "98") and seen(codes)[1] == [2 - (n % 5 - 2) for n in seen(codes)[0]]


def test_whole_branches_can_be_unseen_and_groups_of_one_name_are_two(folder):
    branch = opened(folder, classes="second", hierarchy="kind", split_level=0)
    assert branch.classes == ("fern", "oak")
    levels = opened(folder, hierarchy="kind", levels=(1, 0)).table
    assert levels.groups == (("animal/insect", "animal/mammal", "plant/insect", "plant/tree"), ("animal", "plant"))
    assert levels.parents == ((0, 0, 1, 2, 3), (0, 0, 1, 1))
    named = opened(folder, hierarchy="re:(.)$", levels=(0,)).table  # the last letter
    assert named.groups == (("e", "k", "n", "t"),) and named.parents == ((3, 0, 3, 2, 1),)
    coded = opened(folder, hierarchy="code:re:(.)$", levels=(0,)).table
    assert coded.groups == (("0", "6", "7", "8", "9"),)


def test_what_cannot_be_is_refused_by_name(folder):
    for words, changes in (
        ("data.levels is \\(0, 1\\); it must fall", {"hierarchy": "kind", "levels": (0, 1)}),
        ("entry 4 of the hierarchy 'kind', but class 'ant'", {"hierarchy": "kind", "levels": (4,)}),
        ("data.per_class is 2, which is read of a table", {"classes": "", "per_class": 2}),
        ("are entries of data.hierarchy, which is empty", {"levels": (0,)}),
        ("not a regular expression", {"hierarchy": "re:(", "levels": (0,)}),
        ("not a regular expression", {"hierarchy": "code:re:(", "levels": (0,)}),
        ("a field that no sample", {"label": "species"}),
        ("class .ant. lies in number 0 and in number", {"hierarchy": "captions", "levels": (0,)}),
        ("data.label must name", {"label": ""}),
        ("which draws classes and not sources", {"per_class": 2, "weights": (1.0,), "source": (str(folder),)}),
    ):
        with pytest.raises(ValueError, match=words):
            opened(folder, **changes)


def test_a_balanced_batch_is_a_function_of_seed_and_number(folder):
    dataset = opened(folder, per_class=2)
    batches = train_batches(dataset, None, seed=3, start=0, batch_size=10)
    labels = [next(batches).arrays["label"].tolist() for _ in range(4)]
    batches.close()
    assert all(sorted(collections.Counter(batch).values()) == [2] * 5 for batch in labels)
    resumed = train_batches(dataset, None, seed=3, start=20, batch_size=10)
    assert [next(resumed).arrays["label"].tolist() for _ in range(2)] == labels[2:]
    resumed.close()
    halves = [train_batches(dataset, None, seed=3, start=0, batch_size=10, rows=rows) for rows in ((0, 5), (5, 10))]
    assert [x for half in halves for x in next(half).arrays["label"].tolist()] == labels[0]
    for half in halves:
        half.close()
    with pytest.raises(ValueError, match="data.per_class is 2; it must divide the batch of 9"):
        train_batches(dataset, None, seed=0, start=0, batch_size=9)


def test_members_are_all_drawn_before_one_is_drawn_again():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 5, np.int32)
    order = Balanced(11, labels, 3)
    ids = order.at(np.arange(3 * 3 * 70))
    np.testing.assert_array_equal(order.at(np.arange(100, 130)), ids[100:130])
    assert [len(set(labels[ids[v : v + 3]].tolist())) for v in range(0, len(ids), 3)] == [1] * 210
    for k, size in enumerate((7, 2, 5)):
        mine = ids[labels[ids] == k]
        assert len(mine) == 210 and all(len(set(mine[i : i + size].tolist())) == size for i in range(0, 210 - size + 1, size))
    assert {labels[order.replace(n, a)] for n in (0, 1, 2) for a in range(9)} == {labels[ids[0]]}
    assert not np.array_equal(Balanced(12, labels, 3).at(np.arange(60)), ids[:60])


def test_tokens_are_not_asked_for(folder: Path):
    batch = next(iter(eval_batches(opened(folder), Letters(), batch_size=4)))
    assert sorted(batch.arrays) == ["image", "label", "valid"]
