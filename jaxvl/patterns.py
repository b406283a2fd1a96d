"""Regular expressions that a person wrote into a config."""

import re


def check_pattern(key: str, pattern: str) -> None:
    """Raises ValueError that names the key where a pattern cannot be compiled."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        raise ValueError(f"config.{key}: {shown!r} is not a regular expression: {reason}") from None
