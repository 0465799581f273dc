"""What surrounds the training loop: preflight, run directory, state, checkpoints, recording, evaluation, signals."""
