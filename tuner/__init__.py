"""Finds and proves the fastest config per Problem on a GPU: `python -m tuner sweep`."""
