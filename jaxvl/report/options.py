"""The log section of a config."""

from typing import NamedTuple


class LogOptions(NamedTuple):
    """What is logged, how often, and when silence is suspicious.

    every: steps between lines of metrics.jsonl, TensorBoard, W&B and plain output; floats are averaged in between.
    wandb: W&B project, "" for none. peak_flops: dense FLOP/s of one device for the MFU, 0 to look the device up.
    watchdog: stacks are dumped after this many times the median length of a step (or of an evaluation, ...), but not
    before watchdog_floor seconds; 0 for never. html: write report.html at the end. samples: note the ids of the samples
    of every step in report/samples-<process>.jsonl (see report/samples.py).
    """

    every: int = 50
    tensorboard: bool = True
    wandb: str = ""
    peak_flops: float = 0.0
    watchdog: float = 10.0
    watchdog_floor: float = 300.0
    html: bool = True
    samples: bool = False


def check(options: LogOptions) -> LogOptions:
    """`options`, unchanged. Raises ValueError naming the key, its value and what would be right."""
    rules = (
        ("every", options.every >= 1, "at least 1 step"),
        ("peak_flops", options.peak_flops >= 0, "FLOP/s of one device, or 0 to look the device up"),
        (
            "watchdog",
            options.watchdog == 0 or options.watchdog > 1,
            "above 1 (times the median step), or 0 for no watchdog",
        ),
        ("watchdog_floor", options.watchdog_floor > 0, "above 0 seconds"),
    )
    for key, good, right in rules:
        if not good:
            raise ValueError(f"config.log.{key} is {getattr(options, key)!r}; it must be {right}")
    return options
