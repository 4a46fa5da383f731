from __future__ import annotations

import json
from io import BytesIO

import pycdlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libvirt_specs import INSTANCE_ID, TEXT

from agent.drivers.libvirt import seed
from agent.errors import InvalidArgument
from agent.messages.spec import InstanceSpec, RootDisk, Seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me@x"


def spec_with(**fields) -> InstanceSpec:
    return InstanceSpec(
        name="vm-1", vcpus=1, memory_mib=64, root_disk=RootDisk(size_mib=1), seed=Seed(**fields)
    )


def read_iso(image: bytes) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
    """Return the label and the files, by Rock Ridge and by Joliet name."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(BytesIO(image))
    label = iso.pvd.volume_identifier.decode().strip()
    found: list[dict[str, bytes]] = []
    for kind in ("rr_path", "joliet_path"):
        files = {}
        for folder, _folders, names in iso.walk(**{kind: "/"}):
            for name in names:
                path = f"{folder.rstrip('/')}/{name}"
                out = BytesIO()
                iso.get_file_from_iso_fp(out, **{kind: path})
                files[path.lstrip("/")] = out.getvalue()
        found.append(files)
    iso.close()
    return label, found[0], found[1]


def test_nocloud_image():
    spec = spec_with(
        hostname="web-1",
        user_data="#cloud-config\r\nx: <&>\n\n",
        meta_data={"role": "a: b\n- c", "instance-id": "forged"},
        network_config="version: 2\n",
        ssh_keys=[KEY],
    )
    label, files, joliet = read_iso(seed.build(INSTANCE_ID, spec))
    assert label == "cidata"
    assert files == joliet
    assert sorted(files) == ["meta-data", "network-config", "user-data"]
    assert files["user-data"] == b"#cloud-config\r\nx: <&>\n\n"
    assert files["network-config"] == b"version: 2\n"
    assert json.loads(files["meta-data"]) == {
        "role": "a: b\n- c",
        "instance-id": INSTANCE_ID,
        "local-hostname": "web-1",
        "public-keys": [KEY],
    }


def test_nocloud_has_user_data_even_if_there_is_none():
    _label, files, _joliet = read_iso(seed.build(INSTANCE_ID, spec_with()))
    assert files["user-data"] == b""
    assert "network-config" not in files
    assert json.loads(files["meta-data"])["local-hostname"] == "vm-1"


def test_config_drive_image():
    spec = spec_with(
        datasource="config-drive",
        user_data="#!/bin/sh\n",
        meta_data={"a": "b"},
        network_config='{"links": []}',
        ssh_keys=[KEY],
    )
    label, files, joliet = read_iso(seed.build(INSTANCE_ID, spec))
    assert label == "config-2"
    assert files == joliet
    assert files["openstack/latest/user_data"] == b"#!/bin/sh\n"
    assert files["openstack/latest/network_data.json"] == b'{"links": []}'
    assert json.loads(files["openstack/latest/meta_data.json"]) == {
        "uuid": INSTANCE_ID,
        "name": "vm-1",
        "hostname": "vm-1",
        "meta": {"a": "b"},
        "public_keys": {"key-0": KEY},
    }


@pytest.mark.parametrize("text", ["version: 2", "[]", "{"])
def test_config_drive_refuses_network_data_that_would_stop_cloud_init(text):
    with pytest.raises(InvalidArgument) as caught:
        seed.build(INSTANCE_ID, spec_with(datasource="config-drive", network_config=text))
    assert caught.value.code == "network_config_not_json"


@settings(max_examples=25, deadline=None)
@given(user_data=TEXT, meta=st.dictionaries(TEXT, TEXT, max_size=3))
def test_every_byte_arrives(user_data, meta):
    _label, files, _joliet = read_iso(seed.build(INSTANCE_ID, spec_with(user_data=user_data, meta_data=meta)))
    assert files["user-data"] == user_data.encode()
    read = json.loads(files["meta-data"])
    fixed = {"instance-id", "local-hostname", "public-keys"}
    assert {key: value for key, value in read.items() if key not in fixed} == {
        key: value for key, value in meta.items() if key not in fixed
    }


def test_meta_data_is_also_yaml():
    yaml = pytest.importorskip("yaml")
    meta = seed.nocloud_files(INSTANCE_ID, spec_with(meta_data={"x": "yes", "y": "1e3", "z": "'\"{"}), Seed())
    assert yaml.safe_load(meta["meta-data"])["instance-id"] == INSTANCE_ID
