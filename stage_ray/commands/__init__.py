"""The commands of `stage-ray`, one file each."""
