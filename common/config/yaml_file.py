"""Reading of YAML files, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gridcap.common.errors import ConfigError, PathError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys. Plain YAML silently uses the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the sections in a YAML file; an empty file has none.

    Raises:
        PathError: there is no such file.
        ConfigError: the file is not valid YAML or does not contain sections.
        OSError: reading failed.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        reason = (error.strerror or str(error)).lower()
        raise PathError(f"{path}: {reason}", "pass the path of a YAML file to --config or --recipe") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a UTF-8 text file", "pass the path of a YAML file to --config or --recipe"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"{path}: invalid YAML: {' '.join(str(error).split())}"
        raise ConfigError(message, "fix the file at this position") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        message = f"{path}: must contain sections (seed, data, extract, train, caption)"
        raise ConfigError(message, "see pipeline.yaml for an example")
    return tree


def parse_value(text: str) -> Any:
    """Return the value of a YAML text, such as "1e-4" or "[a, b]".

    Raises:
        yaml.YAMLError, ValueError: the text is not valid YAML.
    """
    return yaml.load(text, _UniqueKeyLoader)
