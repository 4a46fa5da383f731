"""The driver contract: the ledger of what is on the host, and the adoption of foreign domains."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from driver_case import PREFIX, DriverCase, Instance

from agent.drivers.base import Driver
from agent.drivers.verbs.host import Artifact, Holding
from agent.errors import FailedPrecondition, NotFound, Unsupported
from agent.messages.life import ORDINARY, Adoption, Life
from agent.messages.spec_policy import Policy


class HostContract:
    """Ledger and adoption."""

    def test_ledger_of_a_whole_life(self, driver: Driver, driver_case: DriverCase, instance: Instance) -> None:
        """Whatever an instance has is in the ledger as its own; foreign domains are not; nothing is missing or left."""
        driver_case.add_foreign(driver, f"{PREFIX}foreign")
        before = driver.ledger({})
        instance.create()
        holdings = {instance.id: Holding(instance.spec, ORDINARY)}
        ledger = driver.ledger(holdings)
        assert ledger.missing == ()
        ours = [artifact for artifact in ledger.present if artifact not in before.present]
        assert {artifact.instance_id for artifact in ours} == {instance.id}
        assert {artifact.kind for artifact in ours} <= {"domain", "folder"}
        assert all(artifact.proof for artifact in ours)
        driver.undefine(instance.id)
        assert {(a.kind, a.instance_id) for a in driver.ledger(holdings).missing} == {("domain", instance.id)}
        driver.delete_storage(instance.id)
        assert {a.kind for a in driver.ledger(holdings).missing} == {"domain", "disk"}
        assert driver.ledger({}) == before

    def test_an_instance_with_a_domain_is_never_removed_as_a_leftover(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        ledger = driver.ledger({instance.id: Holding(instance.spec, ORDINARY)})
        for artifact in (*ledger.present, Artifact("domain", instance.id, instance.id, proof="metadata")):
            if artifact.instance_id == instance.id:
                with pytest.raises(FailedPrecondition) as caught:
                    driver.remove_artifact(artifact)
                assert caught.value.code == "not_removable"
        assert driver.ledger({instance.id: Holding(instance.spec, ORDINARY)}) == ledger

    def test_adoption_where_it_is_announced(self, driver: Driver, driver_case: DriverCase) -> None:
        nobody = str(uuid.uuid4())
        if "instance.adopt" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.foreign_plan(nobody, False)
            return
        with pytest.raises(NotFound):
            driver.foreign_plan(nobody, False)
        driver.release(nobody)
        foreign = driver_case.add_foreign(driver, f"{PREFIX}adoptee", disk=True)
        power = driver.get(foreign).power
        plan = driver.foreign_plan(foreign, False)
        assert (plan.spec.name, plan.spec.vcpus, plan.spec.memory_mib) == (f"{PREFIX}adoptee", 1, 32)
        life = Life(adopted=plan.adoption)
        for generation in (4, 4):
            driver.adopt(foreign, plan.spec, generation=generation, life=life)
            info = driver.get(foreign)
            assert (info.owned, info.generation, info.spec, info.life, info.power) == (True, 4, plan.spec, life, power)
        with pytest.raises(FailedPrecondition) as caught:
            driver.foreign_plan(foreign, False)
        assert caught.value.code == "owned_domain"
        other = Life(adopted=Adoption(disks=[], own_disks=True, since=datetime.now(UTC)))
        with pytest.raises(FailedPrecondition):
            driver.adopt(foreign, plan.spec, generation=4, life=other)
        driver.release(foreign)
        assert not driver.get(foreign).owned
        driver.adopt(foreign, plan.spec, generation=5, life=life)
        # What is no part of the definition may change, and nothing else.
        labelled = plan.spec.model_copy(update={"labels": {"a": "b"}, "policy": Policy(on_stop="restart")})
        driver.define(foreign, labelled, generation=6, life=life)
        assert driver.get(foreign).spec == labelled
        with pytest.raises(FailedPrecondition) as caught:
            driver.define(foreign, plan.spec.model_copy(update={"vcpus": 2}), generation=7, life=life)
        assert caught.value.code == "instance_adopted"
        ledger = driver.ledger({foreign: Holding(labelled, life)})
        assert (ledger.missing, [a.instance_id for a in ledger.present if a.kind == "domain"]) == ((), [foreign])
        driver.destroy(foreign)
        driver.undefine(foreign)
        driver.delete_storage(foreign)
        driver.delete_adopted_disks(foreign, plan.adoption.disks)
        driver.delete_adopted_disks(foreign, plan.adoption.disks)
        assert driver.ledger({}).present == ()

    def test_one_of_ours_cannot_be_adopted(self, driver: Driver, instance: Instance) -> None:
        instance.create(generation=3)
        life = Life(adopted=Adoption(disks=[], own_disks=False, since=datetime.now(UTC)))
        if "instance.adopt" in driver.capabilities().verbs:
            with pytest.raises(FailedPrecondition) as caught:
                driver.adopt(instance.id, instance.spec, generation=3, life=life)
            assert caught.value.code == "owned_domain"
            driver.release(instance.id)
        assert driver.get(instance.id).owned
