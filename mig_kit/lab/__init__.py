"""Speed beside stock TRL, and what a GPU will need."""
