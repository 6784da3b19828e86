"""Workloads, peers, and one command that prints a table of times, ratios and errors."""
