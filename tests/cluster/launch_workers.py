"""Do what the autoscaler on the head does, without the waiting: launch one node of each type of workers, then end them.

Started as a process of its own, by the file's path. Ray's modules for it are private, and imported here alone.
"""

import sys
from pathlib import Path

import yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


def main(path: str) -> None:
    config = _bootstrap_config(yaml.safe_load(Path(path).read_text()), no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    for name, kind in workers.items():
        sys.stdout.write(f"RESOURCES {name} {kind['resources'].get('CPU')} {kind['resources'].get('GPU')}\n")
        tags = {
            TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-worker",
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_NODE_STATUS: "uninitialized",
            TAG_RAY_LAUNCH_CONFIG: "hash",
            TAG_RAY_USER_NODE_TYPE: name,
        }
        provider.create_node(kind["node_config"], tags, 1)
    nodes = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
    for node in nodes:
        provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "up-to-date"})
    provider.terminate_nodes(nodes)


if __name__ == "__main__":
    main(sys.argv[1])
