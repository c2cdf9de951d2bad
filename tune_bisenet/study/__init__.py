"""The Optuna study behind a sampled search: its points, where it is kept, what it is told, what it begins with."""
