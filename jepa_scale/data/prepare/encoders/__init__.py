"""From records to samples."""
