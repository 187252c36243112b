"""Models, shared-prefix generation and log-probabilities, and training that resumes."""
