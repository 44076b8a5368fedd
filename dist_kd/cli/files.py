"""--config: a preset's name or a path -> what the file gives; and a Config back to such a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from dist_kd.cli.names import FIELDS, LONG, SECRET, SEVERAL, SWITCHES, Given, nearest, shown
from dist_kd.config import Config

PRESETS = Path(__file__).resolve().parents[2] / "configs"  # beside the package, as in a checkout

MAX_BYTES = 64 << 10  # a saved configuration with its comments has 5 KB; PyYAML takes seconds for a megabyte
MAX_BRACKETS = 1000  # of lists and mappings within lines; the time PyYAML takes grows with the square

# YAML 1.1 reads `no` as false, `1e-3` as a text, `010` as 8 and `1:30` as 90. Only these words are special here;
# all else stays text and is converted by the type of its setting, so that a file and a flag mean the same.
WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find(name_or_path: str) -> Path | str:
    """The file meant, or the sentence that says why there is none. A name of a preset goes before a file's."""
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        known = None
    else:
        known = preset_names()
        if name_or_path in known:
            return PRESETS / f"{name_or_path}.yaml"
    if os.path.isfile(path):  # unlike pathlib's, no error for what cannot be a path
        return path
    said = f"--config: {shown(name_or_path)} "
    if os.path.isdir(path):
        inside = path / "config.yaml"
        return (
            said + f"is a folder; name a file in it{f', such as {inside}' if inside.is_file() else ''} (flag --config)"
        )
    if known is None:
        return said + "is not a file (flag --config); a preset is named without folder and .yaml"
    near = nearest(name_or_path, known)
    presets = f"presets: {', '.join(known)}" if known else f"there are no presets in {PRESETS}; give a file's path"
    return said + f"is neither a preset nor a file (flag --config); {f'did you mean {near}? ' if near else ''}{presets}"


def read(path: Path) -> tuple[list[Given], list[str]]:
    """The settings in a YAML file, unconverted, and one problem for each line that cannot be understood."""
    origin = f"file {path}"
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            return [], [f"{path}: has {size} bytes, but settings take at most {MAX_BYTES} ({origin})"]
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise RecursionError
        # compose builds nodes only: no object of any tag is ever made, and doubled keys can still be seen
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        return [], [f"{path}: is nested too deeply; settings are flat ({origin})"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        return [], [f"{path}: is not valid YAML{where}: {getattr(error, 'problem', None) or 'unreadable'} ({origin})"]
    except UnicodeDecodeError:
        return [], [f"{path}: is not text in UTF-8 ({origin})"]
    except OSError as error:
        return [], [f"{path}: cannot be read: {error.strerror} ({origin})"]
    if root is None:  # nothing but comments
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path}: must hold lines `setting: value` ({origin})"]
    given, problems, lines = [], [], {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        where = f"({origin}, line {line})"
        if name in lines:
            problems.append(f"{name}: is given twice, in lines {lines[name]} and {line}; keep one {where}")
            continue
        lines[name] = line
        if _is_mapping_of_scalars(node) and LONG.get(name.replace("-", "_")) == "method_args":
            given += [
                Given(
                    "method_args",
                    f"{k.value}={v.value}",
                    f"{name}.{k.value}",
                    f"{origin}, line {k.start_mark.line + 1}",
                )
                for k, v in node.value
            ]
        elif _is_list_of_scalars(node) and LONG.get(name.replace("-", "_")) in SEVERAL:
            text = ",".join(item.value for item in node.value)
            given.append(Given(LONG[name.replace("-", "_")], text, name, f"{origin}, line {line}"))
        elif not isinstance(node, yaml.ScalarNode):
            kind = "a nested mapping" if isinstance(node, yaml.MappingNode) else "a list"
            problems.append(f"{name}: must be one value, got {kind}; settings are flat {where}")
        elif node.tag not in PLAIN_TAGS:
            problems.append(f"{name}: must be a plain value, got the tag {shown(node.tag)} {where}")
        else:
            item = _given(name, node, f"{origin}, line {line}")
            (problems if isinstance(item, str) else given).append(item)
    return given, problems


def _is_mapping_of_scalars(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and all(
        isinstance(part, yaml.ScalarNode) and part.tag in PLAIN_TAGS for pair in node.value for part in pair
    )


def _is_list_of_scalars(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and all(
        isinstance(part, yaml.ScalarNode) and part.tag in PLAIN_TAGS for part in node.value
    )


def _given(name: str, node: yaml.ScalarNode, origin: str) -> Given | str:
    value = WORDS.get(node.value.lower(), node.value) if node.style is None else node.value
    key = name.replace("-", "_")
    if key in LONG:
        return Given(LONG[key], value, name, origin)
    if key in SWITCHES:
        on, off = SWITCHES[key]
        method = {"true": on, "yes": on, "false": off, "no": off}.get(str(value).lower())
        if method:
            return Given("method", method, name, origin)
        return f"{name}: must be true{' or false' if off else ''}, got {shown(value)} ({origin})"
    if SECRET.search(key):  # the value is not repeated: this text ends up in logs
        return f"{name}: secrets are not taken from files of settings, which are saved with the run ({origin})"
    near = nearest(key, [*FIELDS, *LONG, *SWITCHES])
    hint = f"did you mean {near}?" if near else "see --help"
    return f"{name}: no such setting, got {shown(value)} ({origin}); {hint}"


def write(config: Config, origins: Mapping[str, str]) -> str:
    """Every setting as YAML, in the order of Config, with its origin as a comment; valid for --config."""
    lines = [f"# {type(config).__doc__} Comments: where each value came from."]
    for name in FIELDS:
        value = getattr(config, name)
        # a string is always quoted, so that no word of it can be read as anything else
        style = '"' if isinstance(value, str) else None
        text = yaml.safe_dump(value, default_style=style, width=float("inf")).removesuffix("...\n").strip()
        comment = origins[name].encode("unicode_escape").decode()  # a path may hold a line's end
        lines.append(f"{name}: {text}  # {comment}")
    return "\n".join(lines) + "\n"
