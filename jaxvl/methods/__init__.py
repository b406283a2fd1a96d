"""Pre-training methods by name. A method's module is imported when its options or its functions are first asked for."""

import importlib
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """A module that defines `build` and a tuple of options."""

    module: str
    options_name: str

    def options(self) -> type:
        """The NamedTuple whose fields are the keys of the `method` section."""
        return getattr(importlib.import_module(self.module), self.options_name)

    def build(self, image: Any, text: Any, options: Any) -> Any:
        """The `Method` of two towers (VitOptions, TextOptions) and the options of the method. Raises ValueError for
        values that cannot be."""
        return importlib.import_module(self.module).build(image, text, options)

    def complete(self, options: Any, run: Any) -> Any:
        """`options` with what a `method.Run` decides filled in, where the module defines `complete`. Raises ValueError where the
        two contradict each other."""
        fill = getattr(importlib.import_module(self.module), "complete", None)
        return fill(options, run) if fill else options

    def plain(self, options: Any) -> dict[str, Any]:
        """By the name of each cheaper but equal way of computing that `options` switch on, the options without it."""
        ways = getattr(importlib.import_module(self.module), "PLAIN", {})
        return {name: options._replace(**off) for name, off in ways.items() if options._replace(**off) != options}


METHODS = {
    "clip": Choice("jaxvl.methods.clip", "ClipOptions"),
    "codis": Choice("jaxvl.methods.codis", "CodisOptions"),
    "hpl": Choice("jaxvl.methods.hpl", "HplOptions"),
    "jvsm": Choice("jaxvl.methods.jvsm", "JvsmOptions"),
    "lexvla": Choice("jaxvl.methods.lexvla", "LexvlaOptions"),
    "siglip": Choice("jaxvl.methods.siglip", "SiglipOptions"),
    "tcl": Choice("jaxvl.methods.tcl", "TclOptions"),
}
