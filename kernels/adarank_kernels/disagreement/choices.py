"""The names of the metrics. No torch here."""

METRICS = ("l1", "tv", "kl", "js", "argmax")
