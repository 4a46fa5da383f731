"""A verified image for a step of an operation."""

from __future__ import annotations

from pathlib import Path

from agent.core.operation import Json, Operation
from agent.drivers.base import PreparedImage
from agent.errors import Internal
from agent.messages.spec import ImageSource


async def prepared_image(op: Operation, source: ImageSource, step: str = "image") -> PreparedImage:
    """Fetch and verify an image as a step of its own, which a cancel ends at once."""

    async def fetch() -> Json:
        image = await op.ctx.images.prepare(source, lambda done, total: op.progress(done_bytes=done, total_bytes=total))
        return {"path": str(image.path), "format": image.format, "virtual_size_bytes": image.virtual_size_bytes}

    found = await op.step(step, fetch, cancellable=True, harmless=True)
    if found is None:
        raise Internal(f"step {step} has no output")
    return PreparedImage(
        path=Path(found["path"]),
        format=found["format"],
        virtual_size_bytes=found["virtual_size_bytes"],
        sha256=source.sha256,
    )
