"""Run folders, parameters, what makes a stage stale, and the commands that run notebooks."""
