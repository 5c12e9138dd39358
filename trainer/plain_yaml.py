"""YAML as its version 1.2 reads it: text in, plain values out, and back. Nothing is read as what it does not look like,
and nothing is dropped: a key that stands twice is refused.
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from formats.errors import ConfigError

RESOLVERS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^[-+]?(\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)|[0-9]+\.[0-9]*|\.inf|\.Inf|\.nan|"
            r"\.NaN)$"
        ),
        "-+.0123456789",
    ),
}
"""Kind -> which plain scalars are of it, and how they begin."""
OF_VERSION_1_1 = ("bool", "int", "float", "timestamp", "value")
"""Kinds that PyYAML finds in what is text in 1.2, or another number: `no`, `1:30`, `010`, `2026-11-28`, `=`."""


class _Loader(yaml.SafeLoader):
    """Safe YAML whose scalars follow YAML 1.2: `1e-5` is a number, `save_strategy: no` is a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the base class, which would keep the last of equal keys alone."""
        seen: dict[Hashable, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key_node.value} stands twice; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = key_node
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """A number, a leading 0 being no sign of base 8."""
        text = str(self.construct_scalar(node))
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in entries if tag.rsplit(":", 1)[1] not in OF_VERSION_1_1]
    for key, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of either version would take for something else."""


for _kind, (_pattern, _begins) in RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list(_begins))


def parse_yaml(text: str, where: str) -> Any:
    """The YAML value in `text`.

    Raises:
        ConfigError: the text is not YAML, or a key stands twice; the message gives the place, in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: no tags that construct objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where} must be valid YAML, got a fault{place}: {problem}") from None
    except (ValueError, RecursionError) as error:  # such as !!int x, or a hundred thousand digits
        raise ConfigError(f"{where} must be valid YAML, got a value that cannot be read: {error}") from None


def yaml_text(settings: Mapping[str, Any]) -> str:
    """Plain settings as YAML, in their own order, that `parse_yaml` reads as they are."""
    return str(
        yaml.dump(
            dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
        )
    )
