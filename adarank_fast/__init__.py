"""adarank-fast: mixed-rank LoRA."""
