"""Finished models on test questions: one table of results, and all that reads that table."""
