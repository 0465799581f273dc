"""The commands of `stage-ray`. Each function declares its arguments and options; heavy imports wait until it runs."""
