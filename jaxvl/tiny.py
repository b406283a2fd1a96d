"""A recipe shrunk until it runs in seconds on a laptop: the same code paths, small sizes, the embedded set."""

from ml_collections import ConfigDict

from jaxvl.data.text import TRAINED
from jaxvl.data.triplets import SIBLINGS

TOWER = dict(variant="", width=32, depth=2, heads=2, mlp_dim=64)
TINY = {
    "vit": dict(**TOWER, patch=8), "resnet": dict(depth=0, stages=(1, 1, 1, 1), width=8), "mobilenet": dict(multiplier=0.125),
    "transformer": dict(**TOWER, vocab_size=0), "lstm": dict(vocab_size=0, word_dim=16, width=32),
}  # fmt: skip


def shrink(config: ConfigDict, *, steps: int = 2, devices: int = 8) -> ConfigDict:
    """A copy of a complete config (config.load) with two-layer towers, 32-pixel images, and `steps` steps on glyphs.

    Method, switches, mesh axes in use, precision and evaluations stay; parallel axes above 1 become 2. Batches divide over `devices`.
    """
    small = config.copy_and_resolve_references()
    small.image.update(TINY[config.image.kind])
    small.text.update(TINY[config.text.kind])
    small.tokenizer.update(name=config.tokenizer.name if config.tokenizer.name in TRAINED else "bpe", vocab_size=512, context_length=16)
    cleaning = small.data.cleaning if isinstance(small.data.cleaning, str) else small.data.cleaning[0]
    with small.data.ignore_type():  # a tuple for many sources becomes one value
        small.data.update(source="glyphs://train?size=256", cleaning=cleaning, id="sample" if small.data.id else "")
    small.data.update(weights=(), image_size=32, group_shards=2, chunk=8, threads=1, workers=0)
    small.init.update(image="", text="", whole="", image_adapter="", text_adapter="")
    small.augment.update(randaugment=min(config.augment.randaugment, 1), blur_sigma=(0.1, 0.5))
    if "width" in small.method:
        small.method.width = 16
    if "entries" in small.method:
        small.method.update(entries=0, adapter_heads=2, mlp1=32, mlp2=32)
        small.tokenizer.update(context_length=128, caption_length=0, lexicon_min_count=0, prompt='the "{}" lies on')
    if "fusion_depth" in small.method:
        small.method.update(
            fusion_depth=1, queue=8 * devices, group_size=2, chunks=min(config.method.chunks, 2), mlm_cap=min(config.method.mlm_cap, 4)
        )
    if "codes" in small.method:
        small.method.update(codes=16, ot_group=2, ipot_iterations=min(config.method.ipot_iterations, 5))
    if "num_coarse" in small.method:
        depth = len(config.data.levels)
        small.method.update(classes=0, num_coarse=(0,) * len(config.method.num_coarse), parents=(), pad_to=devices, block=64)
        small.data.update(label="class", classes="all", hierarchy="hierarchy" if depth else "", split_level=-1, levels=(2, 1, 0)[:depth])
        if isinstance(config.method.hierarchy_start, int):
            small.method.hierarchy_start = min(config.method.hierarchy_start, steps // 2)
        small.data.per_class = 2 if config.data.per_class else 0
    if config.data.triplets and config.data.triplets != SIBLINGS:
        small.data.update(
            triplets="attributes" if config.data.attributes else "beside",
            attributes=("style", "weight", "slant") if config.data.attributes else (),
        )
    for key in ("first_stage", "alpha_steps", "penalty_warmup", "freeze_steps"):
        if key in small.method:
            small.method[key] = min(config.method[key], steps - 1)
    small.optim.update(
        hold=tuple((pattern, min(n, steps - 1)) for pattern, n in config.optim.hold),
        step_every=min(config.optim.step_every, max(steps - 1, 1)),
        warmup_steps=min(config.optim.warmup_steps, steps - 1, 1),
        cooldown_steps=min(config.optim.cooldown_steps, 1),
        epochs=min(config.optim.epochs, steps),
    )
    small.train.update(batch_size=2 * devices * config.train.accumulate, steps=steps, epochs=0.0)
    small.mesh.update(data=-1, fsdp=min(config.mesh.fsdp, 2), tensor=min(config.mesh.tensor, 2))
    small.checkpoint.update(every=1)
    small.log.update(every=1, tensorboard=False, wandb="")
    for name in [name for name, section in small.evals.items() if section.kind == "patchdis"]:
        del small.evals[name]  # the embedded set has no masks
    for section in small.evals.values():
        with section.ignore_type():
            section.source = "glyphs://val?size=60" if section.kind == "composed" else "glyphs://val-seen?size=40"
        section.every = 0
        if section.kind == "composed":
            section.triplets = "beside"
        if section.kind == "rerank":
            section.update(
                k_test=min(section.k_test, 4), pairs=min(section.pairs, 2 * devices), batch_size=min(section.batch_size, 5 * devices)
            )
        if section.kind == "metric_learning":
            section.update(source="glyphs://val?size=40", gallery="", label="class", classes="all", hierarchy="", split_level=-1)
    return small
