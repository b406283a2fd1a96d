"""What must not be kept or printed: user names and passwords in URLs, and the signatures of URLs that were signed."""

import re
from typing import Any

# A password may hold a slash, as those of AWS do; behind a host's port there is none. In JSON a quote within a text comes with a backslash.
_URL = re.compile(
    r"""([a-zA-Z][a-zA-Z0-9+.-]*://)([^\s/?#'"<>|]*@|[^\s/?#:@'"<>|]*:(?!\d*/)[^\s'"<>|@]*@)?([^\s?'"<>|]*)(\?(?:\\[^\s'"]|[^\s'"<>|\\])*)?"""
)
# Parameters of signed URLs: of AWS and Google (X-Amz-*, X-Goog-*, AWSAccessKeyId), of Azure's shared access signatures, and plain words.
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|.*(signature|token|secret|password|passwd|credential|api_?key|access_?key(id)?|auth).*|sig|key|pwd|jwt|hmac|bearer|rlkey|resourcekey|policy|key-pair-id"
    r"|s[vstrepi]|srt|spr|skoid|sktid|skt|ske|sks|skv|googleaccessid|expires",
    re.IGNORECASE,
)


def public(text: str) -> str:
    """`text` with its URLs as they may be shown: without user information, and without the parameters that sign them."""
    return _URL.sub(_shown, text) if "://" in text else text


def public_tree(tree: Any) -> Any:
    """The same of every text in dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: public_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(public_tree, tree))
    return public(tree) if isinstance(tree, str) else tree


def _shown(found: re.Match[str]) -> str:
    scheme, _, rest, query = found.groups("")
    path, fragment, below = rest.partition("#")
    query, mark, behind = query.partition("#")
    return scheme + path + _unsigned(fragment, below) + _unsigned("?", query[1:]) + _unsigned(mark, behind)


def _unsigned(mark: str, parameters: str) -> str:
    kept = [part for part in parameters.split("&") if part and not _SECRET.fullmatch(part.partition("=")[0])]
    return mark + "&".join(kept) if kept else ""
