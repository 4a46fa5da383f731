"""The driver contract: metadata, redefinition, names, and domains of others."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from driver_case import (
    NEEDS_DOMAIN,
    OPTIONAL,
    PREFIX,
    Difference,
    DriverCase,
    EventRecorder,
    Instance,
    Verb,
    files_of,
    make_spec,
)

from agent.drivers.base import Driver
from agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
)

READS = frozenset({"console.log", "instance.stats"})
"""What is read touches nothing; whose it is the handler asks."""


class DefinitionContract:
    """Metadata, redefinition, names, and domains of others."""

    def test_metadata_round_trip(self, driver: Driver) -> None:
        awkward = "a<b>&\"'\u00e9\u2603 ]]> \t\n end"
        seed = {
            "hostname": "guest.example",
            "user_data": f"#cloud-config\n# {awkward}\n",
            "meta_data": {"k&<": awkward},
        }
        labels = {"owner": "a <b> & 'c'", "empty": ""}
        instance = Instance(driver, make_spec(seed=seed, labels=labels)).create(generation=2**63 - 1)
        (info,) = [info for info in driver.recover() if info.id == instance.id]
        assert info.spec == instance.spec
        assert info.generation == 2**63 - 1
        assert info == driver.get(instance.id)

    def test_recover_reports_every_domain(self, driver: Driver, driver_case: DriverCase) -> None:
        ours = [Instance(driver).create(generation=number, start=number == 2) for number in range(3)]
        foreign = driver_case.add_foreign(driver, f"{PREFIX}foreign")
        found = {info.id: info for info in driver.recover()}
        for number, instance in enumerate(ours):
            info = found[instance.id]
            assert (info.name, info.generation, info.owned) == (instance.spec.name, number, True)
            assert info.power == ("running" if number == 2 else "stopped")
        assert not found[foreign].owned

    def test_next_driver_finds_what_the_last_one_left(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, tmp_path: Path
    ) -> None:
        instance.create(generation=3, start=True)
        driver.close()
        events = EventRecorder()
        second = driver_case.make(tmp_path, events)
        second.connect()
        try:
            found = {info.id: info for info in second.recover()}
            if driver_case.has(Difference.STATE_DIES_WITH_THE_DRIVER):
                assert instance.id not in found
                return
            info = found[instance.id]
            assert (info.power, info.generation, info.spec) == ("running", 3, instance.spec)
            second.destroy(instance.id)
            events.wait_power(instance.id, "stopped", "destroyed")
            Instance(second, instance.spec, instance.id).remove()
            assert not files_of(tmp_path, instance.id)
        finally:
            second.close()
            driver.connect()

    def test_redefine_of_a_running_domain(self, driver: Driver, instance: Instance) -> None:
        instance.create(generation=1, start=True)
        changed = instance.spec.model_copy(update={"labels": {"colour": "green"}})
        for generation in (2, 3, 3):
            driver.define(instance.id, changed, generation=generation)
            info = driver.get(instance.id)
            assert (info.generation, info.spec, info.power) == (generation, changed, "running")
        assert len([info for info in driver.recover() if info.id == instance.id]) == 1

    def test_name_of_another_domain(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        other = str(uuid.uuid4())
        with pytest.raises(AlreadyExists):
            driver.define(other, instance.spec, generation=1)
        with pytest.raises(NotFound):
            driver.get(other)
        assert driver.get(instance.id).spec == instance.spec

    def test_foreign_domain_is_never_touched(self, driver: Driver, driver_case: DriverCase) -> None:
        name = f"{PREFIX}foreign"
        foreign = driver_case.add_foreign(driver, name)
        before = driver.get(foreign)
        assert (before.name, before.power, before.owned) == (name, "running", False)
        assert (before.spec, before.generation) == (None, None)
        assert (before.vcpus, before.memory_mib) == (1, 32)
        verbs = driver.capabilities().verbs
        refused: dict[str, Verb] = {
            "start": NEEDS_DOMAIN["start"],
            "shutdown": NEEDS_DOMAIN["shutdown"],
            "destroy": NEEDS_DOMAIN["destroy"],
            "undefine": lambda driver, uid: driver.undefine(uid),
        } | {verb: call for verb, call in OPTIONAL.items() if verb in verbs and verb not in READS}
        for verb, call in refused.items():
            with pytest.raises(FailedPrecondition) as caught:
                pytest.fail(f"{verb} returned {call(driver, foreign)}")
            assert caught.value.code == "foreign_domain", verb
        for spec in (make_spec(), make_spec(name=name)):
            with pytest.raises(AlreadyExists):
                driver.define(foreign, spec, generation=1)
        with pytest.raises(AlreadyExists):
            driver.define(str(uuid.uuid4()), make_spec(name=name), generation=1)
        assert driver.get(foreign) == before
