"""Many runs compared: arms that differ in a few keys, searched alike and trained on several seeds."""
