"""A search as a job of a cluster: what is sent, how it stands, and Ray's Jobs API."""
