"""The `jaxvl` command. Heavy imports wait for the subcommand that needs them, so that --help answers at once."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

from jaxvl import faults
from jaxvl.arguments import Parser, alone, least, place
from jaxvl.terminal import guard, tell

# Not when the process began: a script that installs and then runs this command with `exec` is one process.
BEGAN = time.perf_counter()
DESCRIPTION = "Vision-language pre-training in JAX: train, evaluate, prepare data, measure."


def parser() -> argparse.ArgumentParser:
    """The command line of `jaxvl`."""
    top = Parser(prog="jaxvl", description=DESCRIPTION)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser(
        "train", help="train, or continue, the run of a config", description="Any --config.KEY=VALUE overrides the config."
    )
    train.add_argument("--config", required=True, help="configs/x.py, or configs/x.py:argument")
    train.add_argument("--workdir", required=True, type=place, help="where the run lives; an existing run continues")
    train.add_argument("--tiny", action="store_true", help="the same recipe shrunk to two steps of a small model on the embedded set")
    train.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="process 0 of a run of many, where the environment does not say (launch/README.md)",
    )
    train.add_argument("--process", default="", metavar="I/N", help="which process of such a run this is, and of how many")

    evaluate = verbs.add_parser(
        "eval", help="evaluate a run's checkpoint", description="Any --config.evals.KEY=VALUE overrides the run's config."
    )
    evaluate.add_argument("--workdir", required=True, type=place, help="of the run")
    evaluate.add_argument("--step", type=int, help="which checkpoint (default: the newest whole one)")
    evaluate.add_argument("--ema", action="store_true", help="evaluate the averaged parameters")

    bring = verbs.add_parser("import", help="published weights into a folder that config.init reads")
    bring.add_argument("source", help="a folder, an index, a safetensors file, or a name on the Hugging Face hub (NAME@REVISION)")
    bring.add_argument("--out", required=True, type=place, help="a new folder")
    bring.add_argument(
        "--heads", type=least(int, 0), default=0, help="of the towers of an ALBEF or TCL checkpoint (default: one for every 64 channels)"
    )
    bring.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="of the parameters (default: the files' own)")

    export = verbs.add_parser(
        "export", help="a run's model for other programs", description="Any --config.KEY=VALUE overrides the run's config."
    )
    export.add_argument("workdir", type=place, help="of the run")
    export.add_argument("--format", required=True, choices=("hf", "safetensors", "stablehlo", "onnx", "albef", "peft"))
    export.add_argument("--out", required=True, type=place, help="a new folder")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest whole one)")
    export.add_argument("--ema", action="store_true", help="export the averaged parameters")

    words = verbs.add_parser(
        "words",
        help="write a page of the words that a lexical model sees in held-out images",
        description="Any --config.evals.KEY=VALUE overrides the run's config.",
    )
    words.add_argument("workdir", type=place, help="of the run")
    words.add_argument("--images", type=least(int, 1), default=60, help="how many to show")
    words.add_argument("--step", type=int, help="which checkpoint (default: the newest whole one)")
    words.add_argument("--ema", action="store_true", help="show the averaged parameters")

    report = verbs.add_parser("report", help="write a run's report.html anew")
    report.add_argument("workdir", type=place)

    sweep = verbs.add_parser(
        "sweep",
        help="many runs of one recipe, as its sweep() describes them; a killed sweep continues",
        description="Any --config.KEY=VALUE overrides the config of every trial.",
    )
    what = sweep.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="configs/sweeps/x.py, or configs/sweeps/x.py:argument: a file with sweep()")
    what.add_argument("--report", type=place, metavar="DIR", help="only write the tables and the page of the sweep in DIR anew")
    sweep.add_argument("--workdir", type=place, help="where the sweep lives, a folder a trial; an existing sweep continues")
    sweep.add_argument("--workers", type=least(int, 1), default=1, help="trials at a time; GPUs are divided among them")
    sweep.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="KEY=VALUE,...",
        help="a Slurm job a trial, with submitit's parameters: partition=gpu,gpus_per_node=8,timeout_min=600",
    )
    sweep.add_argument("--retry", action="store_true", help="run failed trials again")
    sweep.add_argument("--tiny", action="store_true", help="every trial shrunk to two steps of a small model on the embedded set")

    data = verbs.add_parser("data", help="index, check, describe or make shards").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    index = data.add_parser("index", help="index shards ahead of a run")
    check = data.add_parser("check", help="decode every sample; a table of reasons per shard")
    stats = data.add_parser("stats", help="counts, caption lengths, image sizes, duplicates")
    for verb in (index, check, stats):
        verb.add_argument("paths", nargs="+", help="paths, globs, brace ranges, URLs, glyphs://PART")
        verb.add_argument(
            "--indexes", default="", help="folder of the indexes (default: in the cache); hosts of one run share it as data.indexes"
        )
        verb.add_argument("--json", action="store_true", help="print JSON instead of tables")
        verb.add_argument("--caption-field", default="", help="field of KEY.json with the captions (default: KEY.txt, or found by looking)")
        verb.add_argument("--label", default="", help="field of KEY.json with the label, or cls for KEY.cls (default: found by looking)")
    index.add_argument("--rebuild", action="store_true", help="make the indexes anew; takes back what check --record left out")
    check.add_argument("--record", action="store_true", help="write what cannot be decoded into the index: later runs leave it out")
    make = data.add_parser("make", help="write shards: the embedded glyphs, a folder of images with captions, or an annotation file")
    make.add_argument(
        "what",
        help="glyphs, fashion200k:FOLDER, fashioniq:FOLDER, utzap50k:FOLDER, a folder of NAME.jpg|png|webp with NAME.txt or a list, or such a list (.json, .jsonl, .csv, .tsv): Karpathy's splits, COCO's captions, or rows of image, caption, image_id",
    )
    make.add_argument("--out", required=True, type=place)
    make.add_argument(
        "--layout",
        default="",
        choices=("", "folders", "sop", "inshop", "inaturalist"),
        help="of a set with classes instead of captions (data/layouts.py)",
    )
    make.add_argument(
        "--part",
        default="train",
        help="glyphs: train, val or val-seen; a published set: train, val or test; a layout: train, test, query, gallery",
    )
    make.add_argument("--images", default="", help="annotation file: folder that its paths are below (default: its own)")
    make.add_argument("--split", default="", help="annotation file: splits to take, such as train,restval (default: all)")
    make.add_argument("--size", type=least(int, 1), help="glyphs: number of images")
    make.add_argument("--per-shard", type=least(int, 1), default=1000)

    search = verbs.add_parser("search", help="index images or texts with a run, ask the index, export it").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    embed = search.add_parser(
        "index", help="make an index", description="Any --config.KEY=VALUE overrides the run's config, and is kept with the index."
    )
    embed.add_argument("run", type=place, help="workdir of a run, or what `jaxvl export --format safetensors` made of one")
    embed.add_argument("source", help="a folder of images, shards as in data.source, or a .txt or .jsonl file of texts, one a line")
    embed.add_argument("--index", required=True, type=place, help="a new folder")
    embed.add_argument("--step", type=int, help="which checkpoint (default: the newest whole one)")
    embed.add_argument("--ema", action="store_true", help="embed with the averaged parameters")
    embed.add_argument("--batch-size", type=least(int, 1), default=256)
    embed.add_argument("--threshold", type=least(float, 0), help="lexical vectors keep the words above it (default: 1/√V)")
    embed.add_argument("--active", type=least(int, 0), default=0, help="lexical vectors keep as many words instead")
    embed.add_argument(
        "--pruned",
        type=int,
        nargs=3,
        default=(64, 64, 256),
        metavar=("ITEM", "QUERY", "CANDIDATES"),
        help="two-stage search: words kept of items and queries, candidates scored exactly",
    )
    embed.add_argument(
        "--also",
        action="append",
        default=[],
        choices=("seismic", "faiss"),
        help="another structure to search with, an extra; may be repeated",
    )
    query = search.add_parser("query", help="ask an index")
    query.add_argument("index", type=place)
    asked = query.add_mutually_exclusive_group(required=True)
    asked.add_argument("--text")
    asked.add_argument("--image", type=place)
    query.add_argument("--k", type=least(int, 1), default=10, help="hits")
    query.add_argument("--backend", default="exact", help="exact; lexical: device, two-stage, seismic; dense: faiss")
    query.add_argument("--run", type=place, help="that embeds the query, where it is no longer the path that the index was made from")
    query.add_argument("--explain", action="store_true", help="lexical: the words that made each score")
    query.add_argument("--json", action="store_true", help="print JSON instead of a table")
    layout = search.add_parser("export", help="an index for another search engine")
    layout.add_argument("index", type=place)
    layout.add_argument("--format", required=True, choices=("anserini", "qdrant", "opensearch"))
    layout.add_argument("--out", required=True, type=place, help="a new folder")
    layout.add_argument(
        "--scale", type=least(int, 1), default=10_000, help="anserini: what weights are multiplied by before they are rounded"
    )

    plan = verbs.add_parser(
        "plan",
        help="does a config fit on a topology, what does it send, how fast can it be",
        description="Any --config.KEY=VALUE overrides the config.",
    )
    plan.add_argument("--config", help="configs/x.py, or configs/x.py:argument")
    plan.add_argument(
        "--topology",
        help="v5e:16x16, v5p:4x4x4, v6e:16x16 (compiled for the absent TPU), cpu:8 (compiled for forced devices), h100:8 (a model from shapes)",
    )
    plan.add_argument(
        "--compiles", type=least(int, 1), default=3, help="at most so many; all but the first look for the largest batch that fits"
    )
    plan.add_argument("--limit", type=least(float, 1), default=1800.0, help="seconds that one compilation may take")
    plan.add_argument("--estimate", action="store_true", help="model memory and collectives from shapes; nothing is compiled")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument(
        "--table", type=place, metavar="DIR", help="the large recipes on 8, 64 and 256 chips as a Markdown table; DIR keeps their plans"
    )

    bench = verbs.add_parser(
        "bench",
        help="measure the input pipeline, the step, its terms, the loss, what a re-ranked pair costs or where clients of an export differ; prints JSON, of clients tables",
    )
    bench.add_argument("what", choices=("input", "step", "terms", "loss", "rerank", "proxies", "evaluation", "search", "clients"))
    bench.add_argument("--config", help="step, terms, rerank: the config to measure (default: a small built-in one)")
    bench.add_argument(
        "--rounds", type=least(int, 0), default=3, help="alternated rounds; medians are reported (step: 0 compiles and runs nothing)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors a person can mend are one message without a traceback (exit 2)."""
    guard()
    known, rest = parser().parse_known_args(argv)
    overrides = [r.removeprefix("--config.") for r in rest if r.startswith("--config.") and "=" in r]
    if strange := [r for r in rest if not (r.startswith("--config.") and "=" in r)]:
        parser().error(f"unrecognized arguments: {' '.join(strange)} (overrides are written --config.KEY=VALUE)")
    verb = f"search {known.action}" if known.verb == "search" else known.verb
    if overrides and verb not in ("train", "eval", "export", "words", "sweep", "plan", "bench", "search index"):
        parser().error(f"{known.verb} takes no --config overrides")
    try:
        return RUN[known.verb](known, overrides)
    except KeyboardInterrupt:
        tell(f"jaxvl {known.verb}: interrupted", error=True)
        return _leave(130)
    except BrokenPipeError:  # the reader of the output has gone, as `jaxvl ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(141)
    except Exception as error:
        return _leave(_told(known.verb, error))


def _told(verb: str, error: Exception) -> int:
    """Say what went wrong, and return the exit status: 2 for what a person can mend, 1 for what a restart may, or only a developer."""
    if faults.lost(error):
        if not isinstance(error, (ValueError, OSError)):
            tell(traceback.format_exc(), error=True)
        tell(f"jaxvl {verb}: the connection to another process of this run broke, or a device failed: {error}", error=True)
        return 1
    sentence = faults.sentence(error)
    if not sentence or os.environ.get("JAXVL_TRACEBACK"):
        tell(traceback.format_exc(), error=True)
        return 2 if sentence else 1
    tell(f"jaxvl {verb}: {sentence}\n(JAXVL_TRACEBACK=1 shows where)", error=True)
    return 2


def _leave(status: int) -> int:
    """The exit status; in a run of several processes an exit at once, since JAX's own waits for the others, which wait for this one."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl import config, hosts, train

    hosts.name_by_flags(args.coordinator, args.process, os.environ)
    recipe = config.load(args.config, overrides)
    if args.tiny:
        from jaxvl.tiny import shrink

        recipe = shrink(recipe)
    return train.train(recipe, args.workdir, age=time.perf_counter() - BEGAN)


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl import train

    return train.evaluate(args.workdir, overrides, step=args.step, ema=args.ema)


def _import(args: argparse.Namespace, _: list[str]) -> int:
    from jaxvl.interop import importing

    return importing.run(args.source, args.out, dtype=args.dtype, heads=args.heads)


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl import assembly
    from jaxvl.interop import export

    exact = [] if args.format == "stablehlo" else ["image.dtype=float32", "text.dtype=float32"]
    recipe = assembly.read_recipe(args.workdir, ["image.attention=xla", "text.attention=xla", *exact, *overrides])
    parts = assembly.build(recipe, args.workdir, None)
    memory = assembly.read_memory(parts, args.workdir, step=args.step) if args.format == "albef" else None
    return export.run(parts, assembly.read_params(parts, args.workdir, None, step=args.step, ema=args.ema), args.format, args.out, memory)


def _words(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl import words

    tell(str(words.run(args.workdir, overrides, images=args.images, step=args.step, ema=args.ema)))
    return 0


def _report(args: argparse.Namespace, _: list[str]) -> int:
    from jaxvl import report

    tell(str(report.write_report(args.workdir)))
    return 0


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl.sweep import run

    if args.report:
        others = {"--workdir": args.workdir, "--slurm": args.slurm is not None, "--retry": args.retry, "--tiny": args.tiny}
        alone("--report", others, overrides)
        run.report(args.report)
        return 0
    if not args.workdir:
        raise ValueError("--workdir is missing: where the sweep lives")
    return run.run(args.config, args.workdir, overrides, workers=args.workers, tiny=args.tiny, retry=args.retry, slurm=args.slurm)


def _data(args: argparse.Namespace, _: list[str]) -> int:
    from jaxvl.data import tools

    if args.action == "make":
        return tools.make(
            args.what,
            args.out,
            part=args.part,
            size=args.size,
            per_shard=args.per_shard,
            images=args.images,
            split=args.split,
            layout=args.layout,
        )
    shared = {"json": args.json, "indexes": args.indexes, "caption_field": args.caption_field, "label": args.label}
    if args.action == "check":
        return tools.check(args.paths, record=args.record, **shared)
    if args.action == "index":
        return tools.index(args.paths, rebuild=args.rebuild, **shared)
    return tools.stats(args.paths, **shared)


def _search(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.action == "export":
        from jaxvl.search import layouts

        return layouts.main(args.index, args.format, args.out, args.scale)
    if args.action == "query":
        from jaxvl.search import query

        return query.main(
            args.index,
            text=args.text,
            image=args.image,
            k=args.k,
            backend=args.backend,
            run=args.run,
            explain=args.explain,
            as_json=args.json,
        )
    from jaxvl.search import build

    return build.main(args.run, args.source, args.index, overrides, step=args.step, ema=args.ema, batch_size=args.batch_size, threshold=args.threshold,
                      active=args.active, pruning=build.Pruning(*args.pruned), also=args.also)  # fmt: skip


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from jaxvl.plan import command

    if args.table:
        alone("--table", {"--config": args.config, "--topology": args.topology, "--json": args.json}, overrides)
        return command.table(args.table, limit=args.limit, estimate=args.estimate)
    return command.main(
        args.config, overrides, args.topology, compiles=args.compiles, limit=args.limit, estimate=args.estimate, json=args.json
    )


def _bench(args: argparse.Namespace, overrides: list[str]) -> int:
    import importlib

    return importlib.import_module(f"jaxvl.bench.{args.what}").main(args.config, overrides, rounds=args.rounds)


RUN = {
    "train": _train,
    "eval": _eval,
    "import": _import,
    "export": _export,
    "words": _words,
    "report": _report,
    "sweep": _sweep,
    "data": _data,
    "search": _search,
    "plan": _plan,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
