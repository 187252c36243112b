"""Run folders, parameters, what makes a stage stale, comparisons of runs, and upload."""
