"""Process groups and communication between the ranks of a job."""
