"""What a search's winner is for: load it, export it, score it, let it predict, time it. Searches are only read."""
