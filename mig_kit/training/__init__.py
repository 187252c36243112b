"""What stages 02 and 05 share: training that resumes, the GRPO trainer and its rewards."""
