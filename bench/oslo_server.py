"""oslo.messaging's RPC server with the threading executor, as nova-compute runs it. Needs the `bench` extra."""

from __future__ import annotations

import sys

import oslo_messaging
from oslo_config import cfg


class Endpoint:
    """One method that returns what it is given."""

    def ping(self, _context: dict[str, object], echo: str) -> dict[str, str]:
        """Answer."""
        return {"echo": echo}


def transport(url: str) -> oslo_messaging.RPCTransport:
    """A transport on this broker."""
    # The library registers its tracing options on the process-wide configuration only.
    cfg.CONF([], project="bench", default_config_files=[])
    return oslo_messaging.get_rpc_transport(cfg.CONF, url=url.replace("amqp://", "rabbit://"))


def main() -> None:
    """Serve until ended."""
    target = oslo_messaging.Target(topic="bench", server="bench-host")
    server = oslo_messaging.get_rpc_server(transport(sys.argv[1]), target, [Endpoint()], executor="threading")
    server.start()
    print("ready", flush=True)
    server.wait()


if __name__ == "__main__":
    main()
