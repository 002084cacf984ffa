"""What `jepa-scale config` prints."""
