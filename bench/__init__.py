"""Measurements. Every figure is a ratio of two things measured in turn in one run, because machines drift."""
