"""Philox: counter-based normal numbers, the same on every device."""
