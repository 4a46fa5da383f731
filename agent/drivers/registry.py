"""Finds a driver by its configured name among the installed packages' entry points.

A package adds a driver by an entry point in the group `compute_agent.drivers`; nothing else of the agent knows
which drivers exist. A driver's module is imported only when it is asked for, so that the agent runs without the
libraries of the others.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from agent.drivers.base import Driver
from agent.errors import Internal, InvalidArgument, Unsupported

GROUP = "compute_agent.drivers"


def known_drivers() -> list[str]:
    """Name the installed drivers, whether or not their libraries are there. Reads package metadata on disk."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_driver(name: str) -> type[Driver]:
    """Import the driver `name` and return its class. Idempotent; a retry does not help.

    Raises `InvalidArgument` (code `unknown_driver`) listing the known ones, `Unsupported` (code
    `driver_library_missing`) naming what to install, `Internal` if the entry point leads to no driver.
    """
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        known = ", ".join(known_drivers()) or "none"
        raise InvalidArgument(f"there is no driver {name!r}; known are: {known}", code="unknown_driver", known=known)
    point = points[0]
    try:
        found = point.load()
    except ImportError as exc:
        # A module of ours that is missing is a broken installation and no missing library.
        if exc.name is None or exc.name.partition(".")[0] == "agent":
            raise Internal(f"driver {name!r} ({point.value}) cannot be loaded: {exc}") from exc
        raise Unsupported(
            f"driver {name!r} needs the Python module {exc.name!r}, which is not installed; {_remedy(point, exc.name)}",
            code="driver_library_missing",
            module=exc.name,
        ) from exc
    except AttributeError as exc:
        raise Internal(f"driver {name!r} ({point.value}) cannot be loaded: {exc}") from exc
    if not (isinstance(found, type) and issubclass(found, Driver)):
        raise Internal(f"the entry point of driver {name!r} ({point.value}) is no subclass of Driver")
    return found


def _remedy(point: EntryPoint, module: str) -> str:
    """Say how to get the library: by the extra that has the driver's name, where its package offers one."""
    if point.dist is None:
        return f"install {module}"
    extras = point.dist.metadata.get_all("Provides-Extra") or []
    if point.name in extras:
        return f"install it with: pip install '{point.dist.name}[{point.name}]'"
    return f"install what {point.dist.name} needs for it"
