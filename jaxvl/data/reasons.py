"""Why a sample cannot be used: one word each, counted by shard and shown with its meaning.

An index stores a reason by its place here, so words are only ever added at the end.
"""

from jaxvl.data.formats import UNREAD, told

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
    "bomb": "the image's header declares more pixels than data.max_pixels",
    "tiny": "the image is smaller than data.min_side",
    "unlabelled": "the field that data.label names is missing",
    "unidentified": "the field that data.id names is missing",
    "missing": "a triplet names an image that no shard has",
}
REASONS |= {word: told(word) for word in UNREAD}
REASONS |= {"noend": "the JPEG lacks its end mark, but nothing of the picture; it is used"}
