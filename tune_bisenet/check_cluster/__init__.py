"""What is wrong with a cluster's file, or not yet filled in, before it costs money. Nothing is asked of any cloud.

Rules are functions from a parsed file to sentences. `launcher` has those of `ray up`, `aws` and `gcp` those of what
their clouds are asked for, `kubernetes` those of KubeRay's manifests.
"""
