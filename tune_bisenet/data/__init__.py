"""Street scenes and their labels: where frames come from, how they are packed, and how they are augmented."""
