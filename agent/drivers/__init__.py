"""Hypervisor drivers behind one contract (`base`), and the threads they run in (`executor`)."""
