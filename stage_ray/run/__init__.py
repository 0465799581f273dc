"""What a run writes, and what a person sees meanwhile: checkpoints, numbers, alarms, sample pictures."""
