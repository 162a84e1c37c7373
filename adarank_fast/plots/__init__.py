"""Pictures of plans, training curves and intervals."""
