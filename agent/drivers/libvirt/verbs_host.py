"""The host family of verbs through libvirt: the ledger, and adoption of foreign domains."""

from __future__ import annotations

from collections.abc import Mapping

from agent.drivers.libvirt import adoption, domains, errors, ledger
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.parts import Parts
from agent.drivers.verbs.host import Artifact, ForeignPlan, Holding, Ledger
from agent.errors import Unsupported
from agent.messages.life import Life
from agent.messages.spec import InstanceSpec


class LibvirtHost(Parts):
    """See `agent.drivers.verbs.host`."""

    def ledger(self, holdings: Mapping[str, Holding]) -> Ledger:
        with self._link.call() as connection:
            owned = [domain for domain in domains.describe_all(connection) if domain.owned]
            present = [Artifact("domain", info.id, info.id, proof="metadata", detail=info.name) for info in owned]
            present += ledger.secrets(connection)
        present += ledger.folders(self._storage.root, holdings)
        missing = ledger.missing(self._storage, holdings, {info.id for info in owned})
        return Ledger(tuple(present), tuple(missing))

    def remove_artifact(self, artifact: Artifact) -> bool:
        with self._link.call() as connection:
            return ledger.remove(connection, self._storage, artifact)

    def foreign_plan(self, instance_id: str, own_disks: bool) -> ForeignPlan:
        self._must_adopt()
        with self._link.call() as connection:
            return adoption.plan(domains.find(connection, instance_id), own_disks=own_disks)

    def adopt(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life) -> None:
        self._must_adopt()
        with self._link.call() as connection:
            domain = domains.find(connection, instance_id)
            adoption.adopt(domain, spec, generation=generation, host=self._host, life=life)

    def release(self, instance_id: str) -> None:
        with self._link.call() as connection:
            try:
                adoption.release(domains.find(connection, instance_id))
            except libvirt.libvirtError as exc:
                if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                    raise

    def delete_adopted_disks(self, instance_id: str, disks: list[str]) -> None:
        with self._link.call() as connection:
            used = {
                path
                for domain in connection.listAllDomains()
                if domain.UUIDString() != instance_id
                for path in domains.details(domain, None).disk_paths
            }
        adoption.delete_disks(disks, used)

    def _must_adopt(self) -> None:
        if self._settings.simulated:
            raise Unsupported("the domains of libvirt's simulated hypervisor have no disks that could be adopted")
        if self._settings.containers:
            raise Unsupported("containers cannot be adopted: their roots are no disks")
