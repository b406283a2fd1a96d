"""LexVLA from scratch: the overuse penalty, the FLOPs regulariser and neither, and by the codebook of the texts, three seeds each.

The decoder has read nothing, so its codebook means nothing either: it is trained in the rows of the penalties, and in two more it is tied
to the decoder's embeddings, or frozen as that of a decoder that has read is.

    jaxvl sweep --config=configs/sweeps/lexical.py --workdir=runs/lexical               reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl sweep --config=configs/sweeps/lexical.py:textbook --workdir=runs/lexical_text

A run is two minutes of one core. Recalls are of vectors above 1/√V, unless they say "top" or "dense"; words@10/any is the share of images with a
word of their caption among their ten greatest entries, words@10/other_any the same for another image's caption.
"""


def sweep(data: str = "emoji") -> dict:
    base = {"config": f"../lexvla_mini.py:{data}", "data.source": f"{data}/train-*.tar", "evals.val.source": f"{data}/val-*.tar"}
    return dict(
        metric="val/i2t/r@1",
        also=("val/t2i/r@1", "val/i2t/r@10", "val/t2i/r@10", "val/dense/i2t_r@1", "val/dense/t2i_r@1", "val/top16/i2t_r@1", "val/top16/t2i_r@1", "val/image_active", "val/text_active",
              "val/image_ever_active", "val/text_ever_active", "val/image_most_used", "val/image_use_of_20", "val/words@10/any", "val/words@10/words", "val/words@10/other_any", "val/words@10/other_words"),
        rows={
            "overuse": {**base, "method.penalty": "overuse"},
            "FLOPs": {**base, "method.penalty": "flops"},
            "none": {**base, "method.penalty": "none"},
            "overuse, tied codebook": {**base, "method.text_codebook": "tied"},
            "overuse, frozen codebook": {**base, "method.text_codebook": "frozen", "optim.groups": ((r"^(image|adapter|image_codebook|text|t$)($|/)", 1.0),)},
        },
        seeds=(0, 1, 2),
    )  # fmt: skip
