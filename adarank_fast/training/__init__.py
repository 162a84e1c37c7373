"""Data, models for a task, training with transformers' Trainer and TRL, use of the result."""
