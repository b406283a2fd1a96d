"""Why a sample cannot be used: one word each, counted by shard and shown with its meaning.

An index stores a reason by its place here, so words are only ever added at the end.
"""

from jaxvl.data.formats import UNREAD, told

LOST = (
    "truncated",
    "torn",
    "empty",
    "nottar",
    "pointer",
    "page",
    "zstd",
    "packed",
    "archive",
    "special",
    "unreadable",
    "uncached",
)  # of shards
NOTES = ("joined",)  # of shards: no damage

REASONS = {
    "truncated": "the sample, or the shard, is cut short",
    "noimage": "the sample has no image",
    "nocaption": "the sample has no KEY.txt, or not the field that data.caption_field names",
    "empty": "the image, or the shard, holds nothing",
    "blank": "the caption has nothing visible",
    "duplicate": "the shard holds the key again; the first is used",
    "link": "a symbolic or hard link, never followed",
    "device": "a FIFO or a device, never opened",
    "sparse": "a sparse file",
    "oversized": "larger than any real image or caption",
    "garbage": "a stretch of the shard that is no tar",
    "nottar": "the shard is no tar",
    "special": "the shard is a FIFO, a socket, a device or a folder",
    "unreadable": "the shard, or the image file, cannot be opened",
    "undecodable": "the caption is no UTF-8",
    "corrupt": "the image cannot be decoded",
    "notimage": "the image is something else, such as a web page",
    "bomb": "the image has more pixels than data.max_pixels, or decoding it takes more memory than so many plain ones",
    "tiny": "the image is smaller than data.min_side",
    "unlabelled": "the field that data.label names is missing, or has nothing visible",
    "unidentified": "the field that data.id names is missing",
    "missing": "a triplet names an image that no shard has",
    "unended": "the shard has no end mark: it may have been cut between two members",
    "torn": "the shard's compressed stream is damaged or lacks its end",
    "hollow": "the shard is a whole tar without a sample",
    "pointer": "a pointer of Git LFS or git-annex in place of the shard: `git lfs pull` or `git annex get` brings it",
    "page": "a web page or an error message in place of the shard",
    "zstd": "the shard is compressed with zstd, which is not read: use gzip, bzip2, xz or none",
    "packed": "the shard is compressed with lz4, lzip, lzma, compress or snappy, which are not read: use gzip, bzip2, xz or none",
    "archive": "the shard is a zip, 7z or rar archive or a Parquet file, no tar",
    "ambiguous": "several images under one key, and none is named KEY.jpg, KEY.png or the like",
    "uncached": "the shard, unpacked, is larger than the cache may hold (data.cache_gb), or 100 times its size",
    "gap": "zeros in the shard: tars put end to end, or a stretch that was never written",
    "joined": "image and caption of each sample have different names, which are laid out by one rule throughout",
}
REASONS |= {word: told(word) for word in UNREAD}  # a word more among these moves the next: count tarindex.VERSION up
REASONS |= {
    "noend": "the JPEG lacks its end mark, but nothing of the picture; it is used",
    "trailing": "the JPEG lacks its end mark and unknown bytes follow, so where its picture ends cannot be told",
}
