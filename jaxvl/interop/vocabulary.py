"""A tokenizer written with the ids that an exported model expects."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_tokenizer(tokenizer: Any, folder: Path, ids: np.ndarray | None) -> None:
    """tokenizer.json and tokenizer_config.json of a `data.text.Tokenizer`, whose ids become those of the exported model.

    ids: the exported id of each of our ids, None where they stay. Where ours are one above the tokenizer's own (its offset), the
    files get ours, with a padding token at 0.
    """
    tokenizer.save(folder)
    if ids is None and not tokenizer.offset:
        return
    move = lambda own: own + tokenizer.offset if ids is None else int(ids[own + tokenizer.offset])
    file, names = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = json.loads(file.read_text()), json.loads(names.read_text())
    pad = "<pad>" if tokenizer.offset else None
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = dict(sorted(((token, move(i)) for token, i in model["vocab"].items()), key=lambda item: item[1])) | (
            {pad: 0} if pad else {}
        )
    else:  # Unigram: the place in the list is the id
        rows = {move(i): row for i, row in enumerate(model["vocab"])} | ({0: [pad, 0.0]} if pad else {})
        model["vocab"] = [rows.get(i, [f"<unused{i}>", -1e9]) for i in range(max(rows) + 1)]
        if model.get("unk_id") is not None:
            model["unk_id"] = move(model["unk_id"])
    content["added_tokens"] = [{**token, "id": move(token["id"])} for token in content.get("added_tokens") or []]
    if pad:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].insert(0, {"id": 0, "content": pad, **flags})
        config["pad_token"] = pad
    for special in (content.get("post_processor") or {}).get("special_tokens", {}).values():
        special["ids"] = [move(i) for i in special["ids"]]
    file.write_text(json.dumps(content, ensure_ascii=False))
    names.write_text(json.dumps(config, indent=2) + "\n")
