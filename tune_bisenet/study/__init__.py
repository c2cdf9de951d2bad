"""The Optuna study of a sampled search: what it samples, what it is told, what it begins with."""
