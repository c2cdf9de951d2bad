"""tune_bisenet: run a table of planned BiSeNet trainings under Ray Tune and learn which expectation held."""

__version__ = "0.1.0"
