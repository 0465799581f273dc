"""``stage-ray gpu-check``: does what needs a GPU work on this one? Ten minutes; see bench/README.md."""
