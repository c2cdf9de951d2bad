"""Read what a search left on storage. Imports neither Ray nor torch."""
