"""The host family of verbs on the simulated hypervisor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from agent.drivers.fake.domains import Domain
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.host import Artifact, ForeignPlan, Holding, Ledger
from agent.errors import FailedPrecondition
from agent.messages.life import Adoption, Life
from agent.messages.spec import InstanceSpec, RootDisk
from agent.messages.types import UUID_PATTERN

_DISK_RECORD: Final = "root.qcow2"
_FOREIGN_DISK_MIB: Final = 1024


class FakeHost(Parts):
    """See `agent.drivers.verbs.host`."""

    def ledger(self, holdings: Mapping[str, Holding]) -> Ledger:
        with self._call("ledger", verb="host.audit"), self._hypervisor.lock:
            present = [
                Artifact("domain", domain.id, domain.id, proof="metadata", detail=domain.name)
                for domain in self._hypervisor.domains
                if domain.owned
            ]
            present += self._folders(holdings)
            return Ledger(tuple(present), tuple(self._missing(holdings)))

    def remove_artifact(self, artifact: Artifact) -> bool:
        with self._call("remove_artifact", artifact.instance_id, verb="host.audit"), self._hypervisor.lock:
            folder = Path(artifact.name)
            if artifact.kind != "folder" or folder.parent != self._hypervisor.disks.folder:
                raise FailedPrecondition(f"a {artifact.kind} is not removed by an audit", code="not_removable")
            if not folder.exists():
                return False
            if self._proof(folder) is None or self._hypervisor.domains.get(folder.name) is not None:
                raise FailedPrecondition(f"{folder} is no proven leftover any more", code="not_removable")
            self._hypervisor.delete_disks(folder.name)
            shutil.rmtree(folder, ignore_errors=True)
            return True

    def foreign_plan(self, instance_id: str, own_disks: bool) -> ForeignPlan:
        with self._call("foreign_plan", instance_id, verb="instance.adopt"), self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            if domain.owned:
                raise FailedPrecondition(f"domain {domain.name} is this agent's already", code="owned_domain")
            spec = InstanceSpec(
                name=domain.name,
                vcpus=domain.vcpus,
                memory_mib=domain.memory_mib,
                root_disk=RootDisk(size_mib=_FOREIGN_DISK_MIB),
            )
            disks = [f"/foreign/{domain.name}.qcow2"]
            return ForeignPlan(spec, Adoption(disks=disks, own_disks=own_disks, since=datetime.now(UTC)))

    def adopt(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life) -> None:
        with self._call("adopt", instance_id, verb="instance.adopt"), self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            if domain.owned and domain.life.adopted != life.adopted:
                raise FailedPrecondition(f"domain {domain.name} is this agent's already", code="owned_domain")
            domain.set_spec(spec, generation, life)
            domain.owned = True
            self._hypervisor.domains.put(domain)

    def release(self, instance_id: str) -> None:
        with self._call("release", instance_id, verb="instance.adopt"), self._hypervisor.lock:
            domain = self._hypervisor.domains.get(instance_id)
            if domain is None or not domain.owned or domain.life.adopted is None:
                return
            domain.owned, domain.generation, domain.spec_json, domain.life_json = False, None, None, None
            self._hypervisor.domains.put(domain)

    def delete_adopted_disks(self, instance_id: str, disks: list[str]) -> None:  # the simulation has no such files
        with self._call("delete_adopted_disks", instance_id, verb="instance.adopt"):
            del disks

    # --- inside -----------------------------------------------------------------------------------------------

    def _folders(self, known: Mapping[str, Holding]) -> Iterator[Artifact]:
        folder = self._hypervisor.disks.folder
        for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
            # An adopted guest's folder has its console and no disk of ours; that we know the instance is proof enough.
            proof = self._proof(path) or ("instance" if path.name in known else None)
            yield Artifact(
                "folder",
                str(path),
                path.name if proof else None,
                proof=proof,
                modified_at=datetime.fromtimestamp(path.lstat().st_mtime, UTC),
            )

    def _proof(self, folder: Path) -> str | None:
        named = re.fullmatch(UUID_PATTERN, folder.name) and not folder.is_symlink()
        return "disk-record" if named and (folder / _DISK_RECORD).is_file() else None

    def _missing(self, holdings: Mapping[str, Holding]) -> Iterator[Artifact]:
        for instance_id, holding in holdings.items():
            domain: Domain | None = self._hypervisor.domains.get(instance_id)
            if domain is None or not domain.owned:
                yield Artifact("domain", instance_id, instance_id, detail=holding.spec.name)
            elsewhere = holding.life.adopted is not None or holding.life.shelf is not None
            if not elsewhere and self._hypervisor.disks.get(instance_id) is None:
                yield Artifact("disk", "root", instance_id)
