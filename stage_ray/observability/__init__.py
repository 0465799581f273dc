"""What a run says of itself: metrics, trackers, alarms, logs, progress."""
