"""Figures and a page of what was measured. Needs matplotlib, so only report commands import its modules."""
