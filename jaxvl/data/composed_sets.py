"""The published sets of composed retrieval, from the folders they are handed out in to shards and triplets.

    jaxvl data make fashion200k:/data/fashion200k --out=/data/f200k --part=test

PART-00000.tar ... hold KEY.jpg, KEY.txt (where the image has a text) and KEY.json; PART-triplets.jsonl the fixed triplets, where the set has
them; PART-missing.txt the images that the set names and the folder lacks, which are left out and not fatal.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.data import siblings
from jaxvl.data.indexing import progress
from jaxvl.data.lists import read_json, rows, text_lines
from jaxvl.new_files import new_files

ZAP = ("Category", "SubCategory", "HeelHeight", "Insole", "Closure", "Gender", "Material", "ToeStyle")
ZAP_TRAIN = 0.8  # of the products
ZAP_QUERIES = 5_000
TAGS = 20  # words of Fashion-IQ's attributes that are kept, the last ones


class Item(NamedTuple):
    """An image that a set names: its key, its file, its text ("" for none) and its fields."""

    key: str
    file: Path
    text: str
    fields: dict[str, Any]


class Set(NamedTuple):
    items: list[Item]
    triplets: list[dict[str, Any]]


def make_set(what: str, folder: Path, out: Path, part: str, per_shard: int) -> tuple[list[Path], list[str]]:
    """Writes a part of the set `what` from its folder; returns the shards and the keys of missing images.

    Raises ValueError for an unknown set, and where the folder lacks the set's own lists or every image.
    """
    import webdataset

    if per_shard < 1:
        raise ValueError(f"{per_shard} samples a shard are too few; it must be at least 1")
    try:
        found = SETS[what](folder, part)
    except OSError as error:
        raise ValueError(f"{what}: {folder} is not laid out as the set is published ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: a list in {folder} is not as the set is published ({type(error).__name__}: {error})") from None
    there = [item for item in found.items if item.file.is_file()]
    missing = sorted({item.key for item in found.items} - {item.key for item in there})
    if not there:
        raise ValueError(
            f"{what}: none of the {len(found.items)} images of part {part!r} is in {folder}, for one {found.items[0].file if found.items else 'of none'}"
        )
    if any(out.glob(f"{part}-*.tar")):
        raise FileExistsError(f"{out} holds shards of {part!r} already; choose an empty folder")
    shards = [out / f"{part}-{number:05d}.tar" for number in range(-(-len(there) // per_shard))]
    partial, triplets, lost = (out / f"{part}-{name}" for name in ("shard.partial", "triplets.jsonl", "missing.txt"))
    with new_files(out, [*shards, partial, triplets, lost]):
        for number, shard in enumerate(shards):
            with webdataset.TarWriter(str(partial), encoder=False, mtime=0.0) as writer:
                for item in progress(iter(there[number * per_shard : (number + 1) * per_shard]), per_shard, f"writing {shard.name}"):
                    text = {"txt": item.text.encode()} if item.text else {}
                    fields = json.dumps(item.fields, ensure_ascii=False).encode()
                    writer.write({"__key__": item.key, "jpg": item.file.read_bytes(), **text, "json": fields})
            partial.rename(shard)
        if found.triplets:
            triplets.write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in found.triplets))
        lost.write_text("".join(f"{key}\n" for key in missing))
    return shards, missing


def key_of(path: str) -> str:
    """A key without dots and folders, which tar samples need."""
    return path.rsplit(".", 1)[0].replace("/", "-").replace(".", "_")


def fashion200k(folder: Path, part: str) -> Set:
    """labels/*_PART_detect_all.txt (image, score, caption, parted by tabs) and, for test, test_queries.txt of TIRG."""
    lists = sorted((folder / "labels").glob(f"*_{part}_detect_all.txt"))
    if not lists:
        raise ValueError(f"fashion200k: {folder}/labels has no *_{part}_detect_all.txt")
    items = []
    for path in lists:
        for number, line in text_lines(path):
            if line.count("\t") != 2:
                raise ValueError(f"{path}:{number}: {line[:80]!r} is not an image, a score and a caption parted by tabs")
            image, _, caption = line.split("\t")
            items.append(Item(key_of(image), folder / image, siblings.clean(caption), {"file": image}))
    queries = folder / "test_queries.txt"
    if part != "test" or not queries.is_file():
        return Set(items, [])
    captions = {str(item.fields["file"]): item.text for item in items}
    triplets = []
    for number, line in text_lines(queries):
        source, *rest = line.split()
        if len(rest) != 1 or not {source, *rest} <= captions.keys():
            raise ValueError(f"{queries}:{number}: {line[:80]!r} is not two images of {folder}/labels")
        target = rest[0]
        triplets.append(
            {
                "reference": key_of(source),
                "target": key_of(target),
                "modification": siblings.modification(captions[source], captions[target]),
            }
        )
    return Set(items, triplets)


def fashioniq(folder: Path, part: str) -> Set:
    """image_splits/split.CATEGORY.PART.json, captions/cap.CATEGORY.PART.json, and asin2attr of either name with attribute tags.

    Some images are in the split of several categories, and in the gallery of each: "categories" has all, "category" the first. Their
    text is made of the tags of all.
    """
    inside: dict[str, dict[str, list[str]]] = {}  # of each image the tags it has in each of its categories
    triplets = []
    for category in ("dress", "shirt", "toptee"):
        tags: dict[str, Any] = {}
        for path in sorted(folder.glob(f"**/asin2attr.{category}.{part}*.json")):
            tags |= read_json(path)
        for key in read_json(folder / "image_splits" / f"split.{category}.{part}.json"):
            words = [w for group in tags.get(key, []) for w in (group if isinstance(group, list) else [group])]
            inside.setdefault(key, {})[category] = words
        entries = read_json(folder / "captions" / f"cap.{category}.{part}.json")
        triplets += [
            {"reference": e["candidate"], "target": e["target"], "modification": e["captions"], "category": category} for e in entries
        ]
    items = []
    for key, of in inside.items():
        fields = {"category": next(iter(of)), "categories": list(of)}
        items.append(Item(key, folder / "images" / f"{key}.jpg", tag_text([w for words in of.values() for w in words]), fields))
    return Set(items, triplets)


def tag_text(tags: list[str]) -> str:
    """Lower-case words without repeats, the first of each kept, and of them the last TAGS."""
    return " ".join(list(dict.fromkeys(" ".join(tags).lower().split()))[-TAGS:])


def utzap50k(folder: Path, part: str) -> Set:
    """ut-zap50k-data/meta-data.csv and the images of its folders; 80 % of the products, by a hash of their number, are train.

    The split is a function of the product's number alone. Of test, up to ZAP_QUERIES pairs that differ in one attribute are the queries.
    """
    items = []
    values: dict[str, tuple[str, ...]] = {}
    for _, row in rows(folder / "ut-zap50k-data" / "meta-data.csv"):
        product = row["CID"].split("-")[0]
        if (_share(f"product {product}") < ZAP_TRAIN) != (part == "train"):
            continue
        attributes = tuple((row.get(name) or "none").replace(";", " and ") for name in ZAP)
        path = (
            folder
            / "ut-zap50k-images"
            / "/".join(p for p in (row["Category"], row["SubCategory"], row.get("Brand", ""), f"{row['CID']}.jpg") if p)
        )
        items.append(Item(row["CID"], path, " ".join(attributes), dict(zip(ZAP, attributes, strict=True))))
        if path.is_file():
            values[row["CID"]] = attributes
    return Set(items, [] if part == "train" else list(_one_apart(values)))


def _one_apart(values: dict[str, tuple[str, ...]]) -> Iterator[dict[str, str]]:
    """Queries in the order of a hash: for each reference one target that differs from it in one attribute."""
    groups: dict[tuple, list[str]] = {}
    for key, value in values.items():
        for i in range(len(value)):
            groups.setdefault((i, *value[:i], *value[i + 1 :]), []).append(key)
    chosen = sorted(values, key=lambda key: _share(f"query {key}"))
    count = 0
    for key in chosen:
        value = values[key]
        found = [(i, other) for i in range(len(value)) for other in groups[i, *value[:i], *value[i + 1 :]] if values[other][i] != value[i]]
        if found and count < ZAP_QUERIES:
            i, target = min(found, key=lambda f: _share(f"{key} {f[1]}"))
            count += 1
            yield {"reference": key, "target": target, "modification": f"replace {value[i]} with {values[target][i]}", "kind": ZAP[i]}


def _share(what: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big") / 2**64


SETS: dict[str, Callable[[Path, str], Set]] = {"fashion200k": fashion200k, "fashioniq": fashioniq, "utzap50k": utzap50k}
