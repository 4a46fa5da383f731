"""Prometheus metrics of the agent. Names follow Prometheus's conventions: base units, `_total` for counters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

COMMANDS = Counter("compute_commands_total", "Commands by verb and final state.", ["verb", "state"], registry=REGISTRY)
COMMAND_SECONDS = Histogram(
    "compute_command_duration_seconds",
    "From acceptance to the final result.",
    ["verb"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
    registry=REGISTRY,
)
DUPLICATES = Counter("compute_duplicate_commands_total", "Commands delivered again.", registry=REGISTRY)
DEAD_LETTERS = Counter(
    "compute_dead_letters_total", "Messages that are no commands, by code.", ["code"], registry=REGISTRY
)
DRIVER_EVENTS = Counter(
    "compute_driver_events_total", "Events from the hypervisor, by kind.", ["kind"], registry=REGISTRY
)
HEARTBEATS = Counter(
    "compute_heartbeats_total", "Heartbeats by whether the broker took them.", ["sent"], registry=REGISTRY
)
OUTBOX_WAITING = Gauge("compute_outbox_waiting", "Events not yet confirmed by the broker.", registry=REGISTRY)
LANES_BUSY = Gauge("compute_lanes_busy", "Lanes with work, running or waiting.", registry=REGISTRY)
STUCK_THREADS = Gauge(
    "compute_stuck_threads", "Driver calls past their deadline that have not returned.", registry=REGISTRY
)
LOOP_LAG = Gauge("compute_loop_lag_seconds", "How late the event loop last ran a timer.", registry=REGISTRY)
INSTANCES = Gauge("compute_instances", "Instances by observed state.", ["state"], registry=REGISTRY)
BROKER_CONNECTED = Gauge(
    "compute_broker_connected", "1 while publishing and consuming are possible.", registry=REGISTRY
)
HYPERVISOR_CONNECTED = Gauge("compute_hypervisor_connected", "1 while the hypervisor can be asked.", registry=REGISTRY)
LEFTOVERS = Gauge(
    "compute_leftovers",
    "Things on the host that are the agent's and of no instance, at the last audit.",
    registry=REGISTRY,
)
