"""Paper plans: what fits where, how to split GPUs, and what travels, from published sizes and vendors' figures."""
