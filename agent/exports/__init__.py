"""Exports: finished images of disks on their way out of the host, to file stores and HTTP servers."""
