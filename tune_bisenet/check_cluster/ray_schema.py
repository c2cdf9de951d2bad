"""Ray's own check of a file for `ray up`. Its modules are private, and are imported here alone."""

import contextlib
import copy
import io
import json
import logging
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults, as `ray up` goes on with it. ValueError, in Ray's words, if Ray refuses it."""
    said = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            config = prepare_config(copy.deepcopy(config))
            validate_config(config)
    except jsonschema.ValidationError as error:
        raise ValueError(f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message}") from error
    except (click.ClickException, SystemExit) as error:
        raise ValueError(said.getvalue().strip() or str(error)) from error
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return config


def provider_keys() -> list[str]:
    """What may stand under `provider`: what Ray's schema lists, and three that its code reads. Ray itself takes any."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return [*schema["properties"]["provider"]["properties"], "aws_credentials", "coordinator_address", "key_pair"]
