"""Declared search spaces: every module here defines `SPACE`."""
