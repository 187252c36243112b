"""Folder to policy: processors, weights, adapters and their merge, tokenized prompts."""
