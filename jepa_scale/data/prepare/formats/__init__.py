"""Raw data: a file a format, each of them a reader of records."""
