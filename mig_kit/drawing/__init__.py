"""Pictures, charts, tokens and widgets."""
