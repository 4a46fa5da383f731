"""Logging in to a real broker: TLS, client certificates, and every way in which that can be refused."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError
from structlog.testing import capture_logs

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.bus.base import Outgoing, Queue, Topology
from agent.errors import InvalidArgument, Unavailable
from devstack.rabbitmq import PrivateBroker, Tls

USER = "host-1.example.org"


@dataclass
class Certificates:
    directory: Path
    ca: trustme.CA
    other_ca: trustme.CA

    @property
    def cafile(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        leaf.cert_chain_pems[0].write_to_path(certificate)
        leaf.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("certificates"), trustme.CA(), trustme.CA())
    made.ca.cert_pem.write_to_path(made.cafile)
    made.other_ca.cert_pem.write_to_path(made.directory / "other-ca.pem")
    return made


@pytest.fixture(scope="module")
def client_files(certificates: Certificates) -> tuple[Path, Path]:
    return certificates.issue("client", certificates.ca.issue_cert(USER, common_name=USER))


@pytest.fixture(scope="module")
def broker(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    server = certificates.issue("server", certificates.ca.issue_cert("localhost"))
    tls = Tls(certificates.cafile, *server, external=True)
    with PrivateBroker(tmp_path_factory.mktemp("rabbitmq"), tls=tls) as running:
        running.ctl("add_user", USER, "unused-password")
        running.ctl("set_permissions", USER, ".*", ".*", ".*")
        yield running


async def works(settings: AmqpSettings) -> None:
    bus = AmqpBus(settings, name="tls")
    await bus.connect(timeout_s=120)
    try:
        assert bus.connected
        await bus.declare(Topology(queues=(Queue("tls", durable=False),)))
        await bus.publish(Outgoing("", "tls", b"x", "id", mandatory=True))
    finally:
        await bus.close()


async def refusal(settings: AmqpSettings, *, timeout_s: float = 20) -> InvalidArgument:
    bus = AmqpBus(settings, name="tls")
    with pytest.raises(InvalidArgument) as caught:
        await bus.connect(timeout_s=timeout_s)
    assert not bus.connected
    await bus.close()
    return caught.value


async def test_tls_with_a_password(broker: PrivateBroker, certificates: Certificates) -> None:
    url = broker.tls_url.replace("//", "//guest:guest@")
    await works(AmqpSettings(url=url, cafile=certificates.cafile))


async def test_the_client_certificate_is_the_login(
    broker: PrivateBroker, certificates: Certificates, client_files: tuple[Path, Path]
) -> None:
    settings = AmqpSettings(
        url=broker.tls_url, cafile=certificates.cafile, certfile=client_files[0], keyfile=client_files[1]
    )
    assert settings.mechanism == "EXTERNAL"
    await works(settings)
    bus = AmqpBus(settings, name="who")
    await bus.connect(timeout_s=120)
    listed = await asyncio.to_thread(broker.ctl, "list_connections", "user", "auth_mechanism", "client_properties")
    await bus.close()
    assert listed.count(USER) == 2
    assert "EXTERNAL" in listed
    assert "who.publish" in listed
    assert "who.consume" in listed


async def test_certificate_and_password_together_mean_password(
    broker: PrivateBroker, certificates: Certificates, client_files: tuple[Path, Path]
) -> None:
    url = broker.tls_url.replace("//", "//guest:guest@")
    settings = AmqpSettings(url=url, cafile=certificates.cafile, certfile=client_files[0], keyfile=client_files[1])
    assert settings.mechanism == "PLAIN"
    await works(settings)


async def test_an_unknown_common_name_is_refused(broker: PrivateBroker, certificates: Certificates) -> None:
    stranger = certificates.issue("stranger", certificates.ca.issue_cert("stranger", common_name="stranger"))
    settings = AmqpSettings(url=broker.tls_url, cafile=certificates.cafile, certfile=stranger[0], keyfile=stranger[1])
    assert (await refusal(settings)).code == "bus_access_refused"


async def test_a_wrong_password_is_refused_and_never_shown(
    broker: PrivateBroker, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "p4ssw0rd-not-to-be-seen"
    settings = AmqpSettings(url=broker.url.replace("guest:guest", f"guest:{secret}"))
    with capture_logs() as logs, caplog.at_level(logging.DEBUG):
        error = await refusal(settings)
    assert error.code == "bus_access_refused"
    assert "refuses access" in error.message
    for text in (str(logs), caplog.text, repr(settings), str(error), repr(error.__cause__)):
        assert secret not in text


async def test_an_unknown_virtual_host_is_refused(broker: PrivateBroker) -> None:
    error = await refusal(AmqpSettings(url=broker.url + "nowhere"))
    assert error.code == "bus_access_refused"
    assert "nowhere" in error.message


async def test_a_mechanism_that_is_not_offered_is_refused(
    broker: PrivateBroker, certificates: Certificates, client_files: tuple[Path, Path]
) -> None:
    # Without a certificate on the wire RabbitMQ does not offer EXTERNAL: so behind a plain listener.
    settings = AmqpSettings(
        url=broker.tls_url, cafile=certificates.cafile, certfile=client_files[0], keyfile=client_files[1]
    )
    plain = settings.model_copy(update={"url": AmqpSettings(url=broker.url).url, "auth": "EXTERNAL"})
    assert (await refusal(plain)).code == "bus_access_refused"


async def test_a_broker_of_another_ca_is_not_trusted(broker: PrivateBroker, certificates: Certificates) -> None:
    url = broker.tls_url.replace("//", "//guest:guest@")
    error = await refusal(AmqpSettings(url=url, cafile=certificates.directory / "other-ca.pem"))
    assert error.code == "bus_tls"
    assert "certificate" in error.message


@asynccontextmanager
async def tls_server(
    certificates: Certificates, leaf: trustme.LeafCert, *, demands_certificate: bool = False
) -> AsyncIterator[int]:
    """A TLS port that never gets as far as AMQP. Blocking sockets in a thread: asyncio's server sends no alerts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    if demands_certificate:
        certificates.ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed: the test is over
            client.settimeout(5)
            with contextlib.suppress(OSError), client, context.wrap_socket(client, server_side=True) as secured:
                secured.recv(8)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        await asyncio.to_thread(thread.join)


async def test_an_expired_certificate(certificates: Certificates) -> None:
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    leaf = certificates.ca.issue_cert("localhost", not_before=past, not_after=past + dt.timedelta(1))
    async with tls_server(certificates, leaf) as port:
        error = await refusal(AmqpSettings(url=f"amqps://localhost:{port}/", cafile=certificates.cafile))
    assert error.code == "bus_tls"
    assert "expired" in error.message


async def test_a_certificate_of_another_host(certificates: Certificates) -> None:
    leaf = certificates.ca.issue_cert("rabbit.example.org")
    async with tls_server(certificates, leaf) as port:
        error = await refusal(AmqpSettings(url=f"amqps://localhost:{port}/", cafile=certificates.cafile))
    assert error.code == "bus_tls"
    assert "localhost" in error.message


async def test_a_demanded_certificate_is_missing(certificates: Certificates) -> None:
    leaf = certificates.ca.issue_cert("localhost")
    async with tls_server(certificates, leaf, demands_certificate=True) as port:
        error = await refusal(AmqpSettings(url=f"amqps://localhost:{port}/", cafile=certificates.cafile))
    assert error.code == "bus_tls"


async def test_tls_on_the_plain_port(broker: PrivateBroker, certificates: Certificates) -> None:
    settings = AmqpSettings(url=f"amqps://localhost:{broker.port}/", cafile=certificates.cafile)
    assert (await refusal(settings)).code == "bus_tls"


async def test_plain_on_the_tls_port_ends_in_time(broker: PrivateBroker) -> None:
    bus = AmqpBus(AmqpSettings(url=f"amqp://guest:guest@localhost:{broker.tls_port}/"), name="plain")
    async with asyncio.timeout(240):
        with pytest.raises(Unavailable):
            await bus.connect(timeout_s=1)


async def test_a_silent_peer_ends_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for url in (f"amqp://127.0.0.1:{port}/", f"amqps://127.0.0.1:{port}/"):
        bus = AmqpBus(AmqpSettings(url=url), name="silent")
        async with asyncio.timeout(240):
            with pytest.raises(Unavailable):
                await bus.connect(timeout_s=0.5)
    server.close()


async def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for cafile in (tmp_path / "missing.pem", garbage):
        error = await refusal(AmqpSettings(url="amqps://localhost:1/", cafile=cafile))
        assert error.code == "bus_tls"
        assert "cafile" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://localhost/"},
        {"url": "amqp:///nohost"},
        {"url": "amqp://u:s3cret@[bad/"},
        {"url": "amqp://localhost/", "cafile": "ca.pem"},
        {"url": "amqps://localhost/", "auth": "EXTERNAL"},
        {"url": "amqp://localhost/", "reconnect_min_s": 5, "reconnect_max_s": 1},
        {"url": "amqp://localhost/", "heartbeat_s": 0},
    ],
)
def test_settings_that_cannot_work(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        AmqpSettings.model_validate(fields)
    assert "s3cret" not in str(caught.value)
