"""A search under Ray Tune: checks, driver, trials."""
