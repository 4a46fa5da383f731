"""Reads the flat table of `domainListGetStats` (`block.0.rd.bytes` …). No calls."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree as ET

from agent.drivers.verbs.stats import CpuUse, DiskUse, MemoryUse, NicUse


class Counters:
    """The table of one domain. A key that is missing is a fact that is not known."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table
        self._disks = {
            str(table[f"block.{place}.name"]): f"block.{place}."
            for place in range(int(table.get("block.count", 0)))
            if f"block.{place}.name" in table
        }

    @property
    def answered(self) -> bool:
        """Whether QEMU was asked and has answered: libvirt gives this one only together with QEMU's own."""
        return "balloon.rss" in self._table

    def number(self, key: str) -> int | None:
        value = self._table.get(key)
        return None if value is None else int(value)

    def cpu(self, known_ns: int | None) -> CpuUse:
        """CPU times; `known_ns` is the whole of it where the table has none."""
        found = self.number("cpu.time")
        return CpuUse(
            cpu_time_ns=known_ns if found is None else found,
            user_time_ns=self.number("cpu.user"),
            system_time_ns=self.number("cpu.system"),
        )

    def memory(self, root: ET.Element, known_kib: int | None) -> MemoryUse:
        """Memory of the running guest with this definition. `known_kib` is `current` where the table has none."""
        current, told_at = self.number("balloon.current"), self.number("balloon.last-update")
        current = known_kib if current is None else current
        # Without a moment the guest has never said anything.
        told = self.number if told_at else _nothing
        return MemoryUse(
            # What is plugged in libvirt leaves out.
            current_kib=None if current is None else current + _plugged_kib(root),
            maximum_kib=maximum_kib(root),
            rss_kib=self.number("balloon.rss"),
            available_kib=told("balloon.available"),
            unused_kib=told("balloon.unused"),
            usable_kib=told("balloon.usable"),
            guest_at=datetime.fromtimestamp(told_at, UTC) if told_at else None,
        )

    def disk(self, name: str, device: str, on_host: tuple[int | None, int | None], active: bool) -> DiskUse:
        """`on_host`: bytes that its file takes, and the file's size; Nones where it is no file.

        libvirt's `allocation` is what the file takes while the guest is stopped, and how far the guest has written
        while it runs; its `physical` changes its meaning likewise. So a file is measured and a device believed.
        """
        place = self._disks.get(device)
        if place is None:
            return DiskUse(name, device, allocation_bytes=on_host[0], physical_bytes=on_host[1])
        taken, size = on_host
        return DiskUse(
            name=name,
            device=device,
            read_requests=self.number(f"{place}rd.reqs"),
            read_bytes=self.number(f"{place}rd.bytes"),
            read_time_ns=self.number(f"{place}rd.times"),
            write_requests=self.number(f"{place}wr.reqs"),
            write_bytes=self.number(f"{place}wr.bytes"),
            write_time_ns=self.number(f"{place}wr.times"),
            flush_requests=self.number(f"{place}fl.reqs"),
            flush_time_ns=self.number(f"{place}fl.times"),
            errors=self.number(f"{place}errors"),
            capacity_bytes=self.number(f"{place}capacity"),
            allocation_bytes=taken,
            physical_bytes=self.number(f"{place}physical") if size is None else size,
            written_up_to_bytes=self.number(f"{place}allocation") if active else None,
        )

    def nic(self, index: int, address: str | None) -> NicUse:
        place = f"net.{index}."
        device = self._table.get(f"{place}name")
        return NicUse(
            nic=index,
            mac=address,
            device=None if device is None else str(device),
            rx_bytes=self.number(f"{place}rx.bytes"),
            rx_packets=self.number(f"{place}rx.pkts"),
            rx_errors=self.number(f"{place}rx.errs"),
            rx_drops=self.number(f"{place}rx.drop"),
            tx_bytes=self.number(f"{place}tx.bytes"),
            tx_packets=self.number(f"{place}tx.pkts"),
            tx_errors=self.number(f"{place}tx.errs"),
            tx_drops=self.number(f"{place}tx.drop"),
        )


def _nothing(_key: str) -> int | None:
    return None


def _plugged_kib(root: ET.Element) -> int:
    """Memory that is plugged into a running guest."""
    found = (device.findtext("target/current") for device in root.findall("devices/memory[@model='virtio-mem']"))
    return sum(int(text or 0) for text in found)


def maximum_kib(root: ET.Element) -> int | None:
    """All memory of a definition. libvirt always answers in KiB."""
    text = root.findtext("memory")
    return None if text is None else int(text)


def vcpus(root: ET.Element) -> tuple[int | None, int | None]:
    """How many vCPUs a definition has, and how many it can have."""
    element = root.find("vcpu")
    if element is None or not element.text:
        return None, None
    return int(element.get("current") or element.text), int(element.text)


def mac(interface: ET.Element) -> str | None:
    """The address of an interface of a definition."""
    element = interface.find("mac")
    return None if element is None else element.get("address")


def is_file(mode: int) -> bool:
    """Whether a stat's mode is that of a plain file."""
    return stat.S_ISREG(mode)
