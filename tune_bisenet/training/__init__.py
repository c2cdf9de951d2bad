"""Training one run: torch, no Ray."""
