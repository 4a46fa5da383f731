"""The image verbs: list, prefetch, remove, verify; and who uses which image of the cache.

They take no lane: prefetches run side by side, and the cache itself keeps a removal and a use of one image apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime

from agent.core.context import Context
from agent.core.operation import Json, Operation
from agent.core.registry import Route
from agent.core.runner import Runner
from agent.images.cache import CachedImage
from agent.images.users import Users, mentioned
from agent.messages.verbs_image import (
    ImageList,
    ImageListResult,
    ImagePrefetch,
    ImagePrefetchResult,
    ImageRemove,
    ImageRemoveResult,
    ImageVerify,
    ImageVerifyResult,
    ImageView,
)
from agent.store.base import InstanceRecord

PAGE_BYTES = 512 * 1024
"""A list goes on in a next page beyond this, so that no answer exceeds what a broker takes."""
_NO_USE = frozenset({ImageList.verb, ImageRemove.verb, ImageVerify.verb})
"""Verbs that name an image without a use for it."""


class Usage:
    """Who uses which image. Instances are looked at again only where they changed."""

    def __init__(self, ctx: Context, runner: Runner) -> None:
        self._ctx = ctx
        self._runner = runner
        self._seen: dict[str, tuple[InstanceRecord, frozenset[str]]] = {}

    def __call__(self) -> Mapping[str, Users] | None:
        """Give the users of each image by its sha256; None until every domain was read once: a journal that was lost
        is rebuilt from the domains, and an instance that is not known yet has a disk too.
        """
        if not self._ctx.state.surveyed:
            return None
        seen: dict[str, tuple[InstanceRecord, frozenset[str]]] = {}
        users: defaultdict[str, Users] = defaultdict(Users)
        for record in self._ctx.instances.all():
            known = self._seen.get(record.id)
            if known is None or known[0] is not record:
                known = (record, frozenset((*mentioned(record.spec), *mentioned(record.life))))
            seen[record.id] = known
            for sha256 in known[1]:
                users[sha256].instances.add(record.id)
        self._seen = seen
        for item in self._runner.open:
            if item.record.verb not in _NO_USE:
                for sha256 in mentioned(item.command.data):
                    users[sha256].operations.add(item.record.id)
        return users


async def list_images(op: Operation, data: ImageList) -> ImageListResult:
    """List the cache."""
    found = await op.ctx.images.images()
    rest = [_view(image) for image in found if data.after is None or image.sha256 > data.after]
    page: list[ImageView] = []
    size = 0
    for view in rest:
        # An image's entries stay on one page: the next one begins behind its sha256.
        beside = bool(page) and page[-1].sha256 == view.sha256
        size += len(view.model_dump_json())
        if page and not beside and (len(page) >= data.limit or size > PAGE_BYTES):
            break
        page.append(view)
    return ImageListResult(
        images=page,
        disk_bytes=sum(image.disk_bytes for image in found),
        limit_bytes=op.ctx.images.limit_bytes,
        next_after=page[-1].sha256 if len(page) < len(rest) else None,
    )


async def prefetch(op: Operation, data: ImagePrefetch) -> ImagePrefetchResult:
    """Fetch an image. What has come is lost when the agent is killed: it begins again."""
    told: list[int] = []

    def progress(done: int, total: int | None) -> None:
        told.append(done)
        del told[:-1]
        op.progress(done_bytes=done, total_bytes=total)

    async def fetch() -> Json:
        image = await op.ctx.images.prepare(data.image, progress, boot_file=data.boot_file)
        return {"format": image.format, "virtual_size_bytes": image.virtual_size_bytes, "changed": bool(told)}

    found = await op.step("image", fetch, cancellable=True, harmless=True)
    return ImagePrefetchResult.model_validate({"sha256": data.image.sha256, **(found or {})})


async def remove(op: Operation, data: ImageRemove) -> ImageRemoveResult:
    """Remove an image. Refused where it is not there (`unknown_image`) or in use (`image_in_use`)."""
    if not op.begun:
        await op.ctx.images.find(data.sha256)
        op.ctx.images.check_unused(data.sha256)

    async def discard() -> Json:
        return {"freed_bytes": await op.ctx.images.remove(data.sha256)}

    op.point_of_no_return()
    done = await op.step("remove", discard)
    return ImageRemoveResult(sha256=data.sha256, freed_bytes=(done or {}).get("freed_bytes", 0))


async def verify(op: Operation, data: ImageVerify) -> ImageVerifyResult:
    """Read an image again. Refused where it is not there (`unknown_image`)."""

    async def read() -> Json:
        intact = await op.ctx.images.verify(
            data.sha256, lambda done, total: op.progress(done_bytes=done, total_bytes=total)
        )
        return {"intact": intact}

    done = await op.step("read", read, cancellable=True, harmless=True)
    return ImageVerifyResult(sha256=data.sha256, intact=bool((done or {}).get("intact")))


def _view(image: CachedImage) -> ImageView:
    return ImageView.model_validate(
        {
            "sha256": image.sha256,
            "format": image.kind,
            "state": image.state,
            "size_bytes": image.size_bytes,
            "disk_bytes": image.disk_bytes,
            "virtual_size_bytes": image.virtual_size_bytes,
            "last_used": datetime.fromtimestamp(image.last_used, UTC),
            "in_use_by": sorted(image.users.instances),
            "wanted_by": sorted(image.users.operations),
        }
    )


ROUTES = (
    Route(ImageList.verb, "query", list_images, lane="none"),
    Route(ImagePrefetch.verb, "build", prefetch, lane="none"),
    Route(ImageRemove.verb, "power", remove, lane="none"),
    Route(ImageVerify.verb, "build", verify, lane="none"),
)
