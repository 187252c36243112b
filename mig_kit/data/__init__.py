"""What users bring: their own JSONL, MGrounding-630k, and a real teacher behind an endpoint."""
