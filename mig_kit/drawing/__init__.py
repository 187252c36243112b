"""Pictures, charts and tokens."""
