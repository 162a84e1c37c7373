"""Data, models for a task, and training with transformers' Trainer."""
