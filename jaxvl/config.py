"""Configs: Python files with `get_config()`, completed with every default, overridden from the command line, read strictly.

A section of a config is the field-by-field content of one options tuple, so the tuple's fields are the legal keys.
A key that no tuple has is an error with a suggestion: an option that nothing reads cannot exist.
"""

import ast
import contextlib
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxvl import checkpoint, config_file, mesh, report
from jaxvl.checkpoint import CheckpointOptions
from jaxvl.config_file import ConfigError
from jaxvl.data import augment, dataset, text
from jaxvl.data.augment import AugmentOptions
from jaxvl.data.dataset import DataOptions
from jaxvl.data.lists import kind, read_json
from jaxvl.data.text import TokenizerOptions
from jaxvl.evals import EVALS
from jaxvl.interop import initial
from jaxvl.interop.initial import InitOptions
from jaxvl.mesh import MeshOptions
from jaxvl.methods import METHODS
from jaxvl.models.kinds import KINDS
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions
from jaxvl.rehearsal import rehearse
from jaxvl.report import LogOptions
from jaxvl.secrets import public

LARGEST = 2**31 - 1  # of whole numbers: what a device counts with


class TrainOptions(NamedTuple):
    """How long and how wide. `steps` optimiser steps of `batch_size` global samples, each cut in `accumulate` microbatches.

    Where `steps` is 0, `epochs` passes over the training samples are made instead. rollback: after so many steps in a row whose loss or
    gradient is not finite the run goes back to its newest checkpoint and on with the samples after them (see rollback.py); 0: never.
    """

    batch_size: int = 1024
    steps: int = 0
    epochs: float = 0.0
    accumulate: int = 1
    rollback: int = 10


class Recipe(NamedTuple):
    """A whole experiment: what `jaxvl train` needs, each section typed."""

    seed: int
    method: Any
    image: VitOptions
    text: TextOptions
    init: InitOptions
    lora: LoraOptions
    tokenizer: TokenizerOptions
    data: DataOptions
    augment: AugmentOptions
    optim: OptimOptions
    train: TrainOptions
    mesh: MeshOptions
    checkpoint: CheckpointOptions
    log: LogOptions
    evals: dict[str, Any]


SECTIONS = {name: kind for name, kind in Recipe.__annotations__.items() if hasattr(kind, "_fields")}
CHECKS: dict[str, Callable[[Any], Any]] = {
    "mesh": mesh.check,
    "tokenizer": text.check,
    "data": dataset.check,
    "augment": augment.check,
    "checkpoint": checkpoint.check,
    "log": report.check,
    "init": initial.check,
}


def load(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of `path` ("configs/x.py", "configs/x.py:arg" or the config.json of a run) with all defaults filled in and `overrides` applied.

    overrides: "key.sub=value" strings, parsed to the type of the value they replace.
    Raises ConfigError for a missing file, an unknown key or a value of the wrong type.
    """
    file, _, arg = path.partition(":")
    if file.endswith(".json") and Path(file).is_file():
        saved = read_json(Path(file))
        if not isinstance(saved, dict):
            raise ConfigError(f"{file} holds {kind(saved)}; it must be a config, as `jaxvl train` saves it")
        config = complete(ConfigDict(saved))
    else:
        namespace = config_file.run(path)
        if "get_config" not in namespace:
            raise ConfigError(f"--config={path}: {file!r} defines no get_config()")
        with config_file.told(path):
            config = complete(namespace["get_config"](arg) if arg else namespace["get_config"]())
    return override(config, overrides)


def override(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A complete `config` changed by `overrides`, as `load` takes them. Raises ConfigError.

    Another method, tower or evaluation is chosen first, so that the other overrides are of its keys.
    """
    overrides = list(overrides)
    for item in overrides:
        config = _chosen(config, item)
    values = flags.FlagValues()
    argv = ["jaxvl", *(f"--config.{item}" for item in overrides)]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_explain(config, argv[1:], error)) from None
    for item in overrides:
        _retype(config, item.partition("=")[0].split("."))
    return config


def _chosen(config: ConfigDict, item: str) -> ConfigDict:
    """`config` with the section that an override such as "method.name=siglip" makes another kind of.

    What the section left at its default takes the new kind's. Raises ConfigError for what it set and the new kind does not read.
    """
    key, _, value = item.partition("=")
    where, _, key = key.rpartition(".")
    top, _, name = where.partition(".")
    tables: dict[str, Mapping[str, Any]] = {"method": METHODS, **KINDS, "evals": EVALS}
    options = tables.get(top)
    if options is None or key != ("name" if top == "method" else "kind") or (top == "evals") != bool(name):
        return config
    section = config.to_dict()[top]
    section = section.get(name) if name else section
    if section is None or section.get(key) == value or value not in options:
        return config  # refused by name where the config is read
    before, after = _kind(top, name, section), _kind(top, name, {key: value})
    own = {k: v for k, v in section.items() if k != key and v != before._field_defaults.get(k)}
    if strange := [k for k in own if k not in after._fields]:
        told = ", ".join(f"config.{where}.{k} to {own[k]!r}" for k in strange)
        raise ConfigError(f"--config.{item}: the config sets {told}, which {value} does not read; start from a config of {value}")
    config = config.copy_and_resolve_references()
    parent = config.evals if name else config
    with config.unlocked(), parent.ignore_type():
        parent[name or top] = ConfigDict(_filled({key: value, **own}, after, where, key), convert_dict=True)
    return config


def _kind(top: str, name: str, section: dict) -> Any:
    """The options tuple of a section, or of entry `name` of the evaluations."""
    if top == "evals":
        return _choice(section, EVALS, f"evals.{name}", "kind")
    return _choice(section, METHODS, "method", "name") if top == "method" else _options(top, section)


def _retype(config: ConfigDict, path: list[str]) -> None:
    """What may be a text or something else arrives as text from a command line: "('a.tar', 'b.tar')" is two of them, "5" a number."""
    top, name = path[0], path[1] if path[0] == "evals" else ""
    if len(path) != 2 + bool(name) or top not in config:
        return
    section = config[top][name] if name else config[top]
    value, hint = section[path[-1]], typing.get_type_hints(_kind(top, name, section.to_dict())).get(path[-1])
    if isinstance(value, str) and typing.get_origin(hint) in (types.UnionType, typing.Union):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            typed = _cast(ast.literal_eval(value), hint, ".".join(path))
            with section.ignore_type():
                section[path[-1]] = typed


def to_json(config: ConfigDict, indent: int | None = None) -> str:
    """A config as it is kept with a run: without the credentials of its URLs."""
    return public(config.to_json_best_effort(indent=indent))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by their dotted keys."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}{key}.").items()}


def complete(config: ConfigDict) -> ConfigDict:
    """`config` with every key of every section present, so that a run's saved config tells all of it."""
    if not isinstance(config, (ConfigDict, dict)):
        raise ConfigError(f"the config is {config!r}, a {type(config).__name__}; get_config() must return a ConfigDict")
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    _known(plain, Recipe._fields, "")
    out: dict[str, Any] = {"seed": plain.get("seed", 0)}
    for name in Recipe._fields[1:]:
        section = plain.get(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"config.{name} is {section!r}; it must be a section of keys and values")
        if name == "evals":
            out[name] = {k: _filled(v, _choice(v, EVALS, f"evals.{k}", "kind"), f"evals.{k}", "kind") for k, v in section.items()}
        elif name == "method":
            out[name] = _filled(section, _choice(section, METHODS, name, "name"), name, "name")
        else:
            out[name] = _filled(section, _options(name, section), name)
    return ConfigDict(out, convert_dict=True)


def read(config: ConfigDict) -> Recipe:
    """The typed recipe of a config. Raises ConfigError naming the first key that is unknown or has a wrong type."""
    plain = complete(config).to_dict()
    sections = {name: _typed(_options(name, plain[name]), plain[name], name) for name in SECTIONS}
    method = _typed(_choice(plain["method"], METHODS, "method", "name"), plain["method"], "method")
    evals = {k: _typed(_choice(v, EVALS, f"evals.{k}", "kind"), v, f"evals.{k}") for k, v in plain["evals"].items()}
    recipe = Recipe(seed=_cast(plain["seed"], int, "seed"), method=method, evals=evals, **sections)
    if recipe.seed < 0:
        raise ConfigError(f"config.seed is {recipe.seed}; it must be at least 0")
    for name, options in evals.items():
        if options.every < 0:
            raise ConfigError(f"config.evals.{name}.every is {options.every}; it must be a number of steps, or 0 for the last step alone")
    for name, check in CHECKS.items():
        try:
            check(getattr(recipe, name))
        except (ValueError, OSError) as error:  # OSError: a name that no file system takes
            raise ConfigError(f"config.{str(error).removeprefix('config.')}") from None
    train = recipe.train
    if train.batch_size < 1:
        raise ConfigError(f"config.train.batch_size is {train.batch_size}; it must be at least 1")
    if train.rollback < 0:
        raise ConfigError(f"config.train.rollback is {train.rollback}; it must be a number of steps, or 0 for never")
    if train.accumulate < 1 or train.batch_size % train.accumulate:
        raise ConfigError(f"config.train.accumulate is {train.accumulate}; it must divide train.batch_size {train.batch_size}")
    if (train.steps > 0) == (train.epochs > 0):
        raise ConfigError(f"config.train: set either steps or epochs above 0 (steps is {train.steps}, epochs is {train.epochs})")
    if getattr(recipe.method, "hierarchy", "given") != "given":  # the levels of the data, which they may lack, are then read by nothing
        recipe = recipe._replace(data=recipe.data._replace(levels=()))
    try:
        rehearse(recipe)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return recipe


def _options(name: str, section: dict) -> Any:
    """The tuple of a section's keys; a tower's is that of its kind, by default the first there is."""
    if name not in KINDS:
        return SECTIONS[name]
    kinds = KINDS[name]
    return kinds[_known_kind(section.get("kind", next(iter(kinds))), kinds, name)].options


def _known_kind(kind: Any, kinds: dict[str, Any], name: str) -> str:
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"config.{name}.kind is {kind!r}; it must be one of {', '.join(kinds)}{_near(kind, kinds)}")
    return kind


def _choice(section: dict, options: dict[str, Any], where: str, key: str) -> type:
    if not isinstance(section, dict):
        raise ConfigError(f"config.{where} is {section!r}; it must be a section of keys and values")
    if key not in section:
        raise ConfigError(f"config.{where}.{key} is missing; it must be one of {', '.join(options)}")
    if not isinstance(section[key], str) or section[key] not in options:
        raise ConfigError(f"config.{where}.{key} is {section[key]!r}; it must be one of {', '.join(options)}{_near(section[key], options)}")
    return options[section[key]].options()


def _filled(section: dict, kind: Any, where: str, *extra: str) -> dict:
    _known(section, (*extra, *kind._fields), where + ".")
    missing = [f for f in kind._fields if f not in section and f not in kind._field_defaults]
    if missing:
        raise ConfigError(f"config.{where} lacks {', '.join(missing)}")
    values = {f: section.get(f, kind._field_defaults.get(f)) for f in kind._fields if f not in extra}
    return {k: section[k] for k in extra} | {f: _tuples(v) for f, v in values.items()}


def _tuples(value: Any) -> Any:
    """Lists, which are what JSON makes of tuples, as tuples: the command line can replace those alone."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _known(section: dict, fields: Iterable[str], where: str) -> None:
    fields = tuple(fields)
    for key in section:
        if key not in fields:
            raise ConfigError(f"config.{where}{key} is a key that nothing reads{_near(key, fields)}; legal keys: {', '.join(fields)}")


def _typed(kind: Any, section: dict, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{k: _cast(section[k], hints[k], f"{where}.{k}") for k in kind._fields})


def _cast(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`: ints serve as floats, lists as tuples; anything else of another type is an error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for arg in (a for a in args if a is not type(None)):
            try:
                return _cast(value, arg, where)
            except ConfigError:
                continue
        raise ConfigError(f"config.{where} is {value!r}; it must be {hint}")
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"config.{where} is {value!r}; it must be one of {', '.join(map(repr, args))}{_near(value, args)}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"config.{where} is {value!r}; it must have {len(inner)} entries")
        return tuple(_cast(v, a, where) for v, a in zip(value, inner, strict=True))
    plain = origin or hint
    if plain in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= (LARGEST if plain is int else sys.float_info.max):  # nan is in no order
            raise ConfigError(f"config.{where} is {value}; it must be {'from -2^31 to 2^31 - 1' if plain is int else 'a finite number'}")
        value = float(value) if plain is float else value
    if plain is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"config.{where} is {value!r}, a {type(value).__name__}; it must be {getattr(hint, '__name__', hint)}")
    return value


def _near(word: Any, words: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(word), [str(w) for w in words], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(config: ConfigDict, overrides: list[str], error: Exception) -> str:
    """Which override is at fault: the first whose key is not in the config, else the flag parser's own words."""
    for item in overrides:
        key = item.removeprefix("--config.").partition("=")[0]
        node: Any = config
        for depth, part in enumerate(key.split(".")):
            if not isinstance(node, ConfigDict) or part not in node:
                known = list(node) if isinstance(node, ConfigDict) else []
                where = ".".join(["config", *key.split(".")[:depth]])
                return f"{item}: {where} has no key {part!r}{_near(part, known)}; legal keys: {', '.join(known)}"
            node = node[part]
    return str(error).replace("flag --", "")
