"""GRPO that reads every prompt once per group."""
