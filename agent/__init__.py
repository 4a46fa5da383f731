"""compute-agent: one process per hypervisor host that carries out lifecycle commands from a message bus."""

__version__ = "0.1.0"
