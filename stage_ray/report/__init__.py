"""What a run leaves for a person to look at: one HTML page with curves, pictures and comparisons."""
