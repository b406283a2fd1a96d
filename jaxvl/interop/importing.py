"""`jaxvl import`: published weights become a verified checkpoint of ours, beside the options of its towers.

OUT/model.json      which model it is: what `interop.initial` and configs read
OUT/checkpoints/    its parameters as step 0, hashed
OUT/tokenizer/      the source's tokenizer, where it has one: a value for config.tokenizer.name
"""

import json
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxvl import checkpoint
from jaxvl.data import lists
from jaxvl.interop import albef, foreign, load, tensors
from jaxvl.interop.published import Fused, Published
from jaxvl.models import kinds
from jaxvl.new_files import new_folder
from jaxvl.progress import say
from jaxvl.terminal import tell

FILE, FORMAT = "model.json", 1
KEPT = ("config.json", "*.safetensors.index.json", "open_clip_config.json")
WEIGHTS = (
    ("model*.safetensors",),
    ("open_clip_*.safetensors",),
    ("*.safetensors",),
)  # of a repository, in the order in which they are asked for
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


class Origin(NamedTuple):
    """What an imported folder remembers of its source. layout: place in `names.layouts`; with prefix it writes the files back."""

    model: Published
    source: str
    prefix: str


def run(source: str, out: Path, *, dtype: str = "", heads: int = 0) -> int:
    """Import a folder, an index, a safetensors file or a name on the Hugging Face hub into the new folder `out`.

    dtype: of the parameters, float32 or bfloat16; by default bfloat16 where every tensor is, else float32. heads: of a checkpoint of
    ALBEF or TCL whose heads are not of the usual width; its teacher and queues come with it. `out` appears when it
    is whole. Raises ValueError for a source that is damaged or no model of ours, listing every tensor at fault, FileExistsError.
    """
    started = time.perf_counter()
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or delete it")
    files = _fetch(source)
    stored = tensors.find(files)
    dtype = dtype or ("bfloat16" if all(t.dtype.name == "bfloat16" for t in stored.values()) else "float32")
    if heads and not albef.holds(stored):
        raise ValueError(f"--heads is for checkpoints of ALBEF and TCL, which do not tell it; {source} is none")
    found = load.load(files, dtype=dtype, heads=heads)
    params, memory = albef.split(found.params) if found.model.fused else (found.params, {})
    with new_folder(out) as partial:
        with checkpoint.open_saver(partial / "checkpoints", checkpoint.CheckpointOptions()) as saver:
            saver.save(0, {"params": params, **({"memory": memory} if memory else {})}, {"source": source}, block=True)
        (partial / "checkpoints" / "LOCK").unlink()
        body = {"format": FORMAT, **Origin(found.model, source, found.prefix)._asdict(), "model": _plain(found.model)}
        (partial / FILE).write_text(json.dumps(body, indent=1) + "\n")
        _keep_tokenizer(files if files.is_dir() else files.parent, partial / "tokenizer")
        partial.rename(out)
    leaves = jax.tree.leaves(found.params)
    size, peak = (
        sum(x.nbytes for x in leaves),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )
    say(f"{source}: {sum(x.size for x in leaves):,} parameters in {len(stored)} tensors, {size / 1e9:.2f} GB as {dtype}")
    say(f"{time.perf_counter() - started:.1f} s; the process held at most {peak / 1e9:.2f} GB of host memory")
    if found.dropped:
        say(f"no weights of the model, left out: {', '.join(found.dropped)}")
    for name in ("image", "text"):
        if getattr(found.model, name):
            tell(f"config.{name} = dict({', '.join(f'{k}={v!r}' for k, v in tower(out, name).items())})")
            tell(f'config.init.{name} = "{out}"')
    if found.model.fused:
        tell(
            f"config.method.fusion_depth, config.method.width, config.method.queue = {found.model.fused.fusion_depth}, {found.model.fused.width}, {found.model.fused.queue}"
        )
        tell(f'config.init.whole = "{out}"')
    return 0


def read(folder: str | Path) -> Origin:
    """What `run` wrote beside the parameters. Raises ValueError where the folder is none of its own."""
    file = Path(folder) / FILE
    try:
        body = lists.read_object(file, "format")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of `jaxvl import`: {file.name} cannot be read ({error})") from None
    if body["format"] != FORMAT:
        raise ValueError(f"{file}: format {body['format']}, but this version of jaxvl reads format {FORMAT}; import it again")
    try:
        m = body["model"]
        options = {name: tower_options(name, m[name]) if m[name] else None for name in ("image", "text")}
        fused = Fused(**m["fused"]) if m.get("fused") else None
        return Origin(Published(**{**m, **options, "scalars": tuple(m["scalars"]), "fused": fused}), body["source"], body["prefix"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); import {body.get('source', 'the model')} again") from None


def tower(folder: str | Path, name: str) -> dict[str, Any]:
    """The section of a config that describes an imported tower: `config.image = tower(folder, "image")`.

    Defaults are left out, and the head, which is the method's.
    """
    options = getattr(read(folder).model, name)
    if options is None:
        raise ValueError(f"{folder} has no {name} tower")
    plain = {"vit", "transformer"}  # the kinds that a section without one has
    told = lambda k, v: v not in plain if k == "kind" else v != options._field_defaults[k] and k not in ("head", "head_bias")
    return {k: v for k, v in options._asdict().items() if told(k, v)}


def options_of(kind: Any, section: dict[str, Any]) -> Any:
    """A tower's options of a JSON section; keys of another version are left out."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k in kind._fields})


def tower_options(name: str, section: dict[str, Any]) -> Any:
    """A tower's options of its section of a config or a model.json, of whichever kind it is."""
    found = kinds.KINDS[name]
    return options_of(found[section.get("kind", next(iter(found)))].options, section)


def _plain(model: Published) -> dict[str, Any]:
    return {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in model._asdict().items()}


def _fetch(source: str) -> Path:
    """The folder or file of a source; of a name on the hub (NAME or NAME@REVISION) what can be read of its repository."""
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        return Path(source)
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = source.partition("@")
    try:
        for weights in WEIGHTS:  # the first that the repository has, since many hold the same model under several names
            folder = Path(snapshot_download(name, allow_patterns=[*KEPT, *TOKENIZER, *weights], revision=revision or None))
            if any(folder.glob("*.safetensors")):
                return folder
        names = HfApi().list_repo_files(name, revision=revision or None)
    except Exception as error:
        raise ValueError(
            f"{source} is no local path, and cannot be fetched from the hub: {next(iter(str(error).splitlines()), repr(error))}"
        ) from None
    if found := foreign.weights(names):
        raise ValueError(
            f"{source} has no safetensors but PyTorch pickles ({found[0]}), which could run any code and are not opened here: name a revision "
            f"that has them (many have {name}@refs/pr/1), or download {found[0]} and import that file, which tells how it is converted"
        )
    raise ValueError(f"{source} has no safetensors: it holds {', '.join(names[:20]) or 'nothing'}")


def _keep_tokenizer(folder: Path, target: Path) -> None:
    found = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    if not any(p.name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model") for p in found):
        return
    target.mkdir()
    for path in found:
        if path.stat().st_size < 1024 and "Git LFS" in (what := foreign.told(path)):
            raise foreign.FileError(what)
    for path in [*found, folder / "config.json"]:  # the config names the tokenizer's class where its own files do not
        if path.is_file():
            shutil.copyfile(path, target / path.name)
