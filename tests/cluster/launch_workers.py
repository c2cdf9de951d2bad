"""Launch one node of each worker type as the autoscaler on the head does, and end them: `launch_workers.py FILE`.

A process of its own, since Ray's modules for it are private and keep state.
"""

import sys
from pathlib import Path

import yaml
from ray.autoscaler import tags
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider


def main(path: str) -> None:
    config = _bootstrap_config(yaml.safe_load(Path(path).read_text()), no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        if name == config["head_node_type"]:
            continue
        sys.stdout.write(f"RESOURCES {name} {kind['resources'].get('CPU')} {kind['resources'].get('GPU')}\n")
        worker = {
            tags.TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-worker",
            tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER,
            tags.TAG_RAY_NODE_STATUS: "uninitialized",
            tags.TAG_RAY_LAUNCH_CONFIG: "hash",
            tags.TAG_RAY_USER_NODE_TYPE: name,
        }
        provider.create_node(kind["node_config"], worker, 1)
    nodes = provider.non_terminated_nodes({tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER})
    for node in nodes:
        provider.set_node_tags(node, {tags.TAG_RAY_NODE_STATUS: "up-to-date"})
    provider.terminate_nodes(nodes)


if __name__ == "__main__":
    main(sys.argv[1])
