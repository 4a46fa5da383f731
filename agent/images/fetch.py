"""Open an image source, whatever its scheme. Knows nothing of hashes, formats or the cache."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from agent.images.local import open_file
from agent.images.policy import ImagePolicy, check_source
from agent.images.stream import Resume, Stream
from agent.images.web import open_http


def open_source(url: str, policy: ImagePolicy, resume: Resume | None = None) -> AbstractAsyncContextManager[Stream]:
    """Open `url` for reading once, from where `resume` says if the source can, else from the start.

    Nothing is retried here.

    Raises `ImageRejected` (`image_source_forbidden`, `image_source_denied`, `image_missing`) where a retry
    cannot help, `Unavailable` (`image_unavailable`, `image_stalled`, `image_truncated`) where it may.
    """
    check_source(policy, url)
    return open_file(url, policy, resume) if url.startswith("file:") else open_http(url, policy, resume)
