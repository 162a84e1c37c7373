"""The experiment: rank allocators trained under one parameter budget, and the report."""
