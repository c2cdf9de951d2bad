"""Search on a cluster: check its file, submit jobs to it, watch over its nodes."""
