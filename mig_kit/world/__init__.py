"""The drawn world of the tiny profile: scenes, tasks, suites and the rule-based teacher."""
