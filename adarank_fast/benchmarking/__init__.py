"""Training steps of a user's own model, timed on the user's own machine."""
