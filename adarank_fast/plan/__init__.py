"""Rank plans: the file, the allocation of a budget, and what trainers read."""
