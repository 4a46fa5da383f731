"""What several folders of tests share: the agent as a process, a recorder of the bus, checks for leftovers."""
