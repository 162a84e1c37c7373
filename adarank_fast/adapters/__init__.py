"""PEFT adapters: inject a plan, fuse the layers, compile, export, merge."""
