"""The demo, and the models and texts it runs on."""
