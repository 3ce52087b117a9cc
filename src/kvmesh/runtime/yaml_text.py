"""YAML that people write, read strictly: a key that stands twice in one table is refused, and nothing is dropped."""

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, which may stand several times: each brings in a table, and none replaces another."""


class RepeatedKeyError(ValueError):
    """A key stands twice in one table; the text names it and its lines."""


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, None of an empty one. Raises: RepeatedKeyError, yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError as exc:
        raise yaml.YAMLError("it is nested too deep") from exc
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which of equal keys keeps the last without a word, with a check before it chooses."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # Here, and not when the table is made: by then merges have added keys that may well be there again.
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, same = key.start_mark.line + 1, (key.tag, key.value)
            if same in first_lines:
                raise RepeatedKeyError(
                    f"line {line}: {key.value} is there already, in line {first_lines[same]}: keep one of them"
                )
            first_lines[same] = line
        return node
