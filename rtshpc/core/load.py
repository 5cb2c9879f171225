"""YAML files and `--set` -> config; every mistake is one line that names the file and the key.

A file of any kind may start from another of its kind with `base: NAME`; mappings are merged key by key,
`null` takes the base's value away, all else replaces it. In a sweep, `data`, `model` and `site` name a file
(`data: synthetic`) or start from one (`data: {base: synthetic, chip: {size_px: 128}}`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from rtshpc.core.cell import Cell
from rtshpc.core.config import DataConfig, ModelConfig, RunConfig, Section, SiteConfig
from rtshpc.core.config.explain import explain, show
from rtshpc.core.errors import ConfigError, guess
from rtshpc.core.grid import GridError, combinations
from rtshpc.core.records import write_text

FOLDERS = {
    "sweep": "sweeps",
    "data": "data",
    "model": "models",
    "site": "sites",
    "request": "requests",
    "programme": "programmes",
}
"""Kind of config -> folder under configs/."""

PROVENANCE = "provenance"
"""Key of a run's config.yaml that says what the run was made with."""

AnySection = TypeVar("AnySection", bound=Section)
Key = tuple[str, ...]


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As yaml.SafeLoader, but a duplicate key is an error with its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = cast(Any, self.construct_object(key_node, deep=True))  # pyright: ignore[reportUnknownMemberType]
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Written in C where PyYAML was built with libyaml, and ten times as fast: for what this code has written itself.
_OwnDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
OwnLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Raw:
    """A config before validation: values, and which file or `--set` each came from."""

    values: dict[str, Any]
    origins: dict[Key, tuple[str, int]] = field(default_factory=dict[Key, tuple[str, int]])
    """Key prefix -> (place, leading keys that are not spelled in that place)."""

    def locate(self, key: Key) -> tuple[str, Key]:
        """Place that gave `key` (or the nearest section above it) and the key as spelled there."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.origins:
                place, strip = self.origins[key[:length]]
                return place, key[strip:]
        return "config", key

    def below(self, at: Key) -> Raw:
        """The same values as the section `at` of a larger config."""
        values = self.values
        for name in reversed(at):
            values = {name: values}
        moved = {(*at, *key): (place, strip + len(at)) for key, (place, strip) in self.origins.items()}
        return Raw(values, moved)

    def merge(self, other: Raw) -> None:
        """Put the values of `other` over these: mappings key by key, null takes away, else replace."""
        self._merge(self.values, other.values, other, ())

    def assign(self, key: Key, value: Any, place: str) -> None:
        """Put one value in place; its key must lead through sections. Raises ConfigError."""
        section = self.values
        for depth, name in enumerate(key[:-1]):
            if name not in section:
                section[name] = {}
                self.origins[key[: depth + 1]] = (place, 0)
            inner = section[name]
            if not isinstance(inner, dict):
                way = ".".join(key[: depth + 1])
                raise ConfigError(f"{place}: {'.'.join(key)}: {way} = {show(inner)} has no keys")
            section = cast(dict[str, Any], inner)
        if value is None:
            section.pop(key[-1], None)
        else:
            section[key[-1]] = value
        self._forget(key)
        self.origins[key] = (place, 0)

    def _merge(self, mine: dict[str, Any], theirs: Mapping[str, Any], other: Raw, at: Key) -> None:
        for name, value in theirs.items():
            key = (*at, name)
            old = mine.get(name)
            if isinstance(value, dict) and isinstance(old, dict):
                self._merge(cast(dict[str, Any], old), cast(dict[str, Any], value), other, key)
                continue
            self._forget(key)
            if value is None:
                mine.pop(name, None)
                continue
            mine[name] = value
            place, local = other.locate(key)
            self.origins[key] = (place, len(key) - len(local))
            self.origins.update({k: v for k, v in other.origins.items() if k[: len(key)] == key})

    def _forget(self, key: Key) -> None:
        for origin in [origin for origin in self.origins if origin[: len(key)] == key]:
            del self.origins[origin]


def shipped_folder(name: str) -> Path:
    """Folder `name` (`configs` or `slurm`) of the clone this code lies in, else of the installed package."""
    package = Path(str(resources.files("rtshpc")))
    clone = package.parent / name
    if clone.is_dir() and (package.parent / "pyproject.toml").is_file():
        return clone
    return package / "_shipped" / name


def config_folders(kind: str) -> list[Path]:
    """Where names of this kind are looked up: ./configs first, then what came with the code."""
    folders = [Path("configs") / FOLDERS[kind], shipped_folder("configs") / FOLDERS[kind]]
    return [folder for folder in folders if folder.is_dir()]


def known_names(kind: str) -> list[str]:
    """Names that can be given for a config of this kind."""
    return sorted({path.stem for folder in config_folders(kind) for path in folder.glob("*.yaml")})


def find_config(kind: str, name_or_path: str, place: str = "") -> Path:
    """The YAML file that a name or a path means.

    Raises:
        ConfigError: no such file; `place` says who asked for it.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
        if path.is_file():
            return path
        raise ConfigError(f"{place}{text}: no such file. Or give a name.{guess(Path(text).stem, known_names(kind))}")
    for folder in config_folders(kind):
        path = folder / f"{text}.yaml"
        if path.is_file():
            return path
    raise ConfigError(f'{place}{kind} "{text}" is unknown.{guess(text, known_names(kind))}')


def parse_yaml(text: str, place: str, loader: Any = _UniqueKeyLoader) -> Any:
    """One YAML document by a safe loader, which refuses duplicate keys unless another is given; every key as text.

    Raises:
        ConfigError: not YAML; the line is named.
    """
    try:
        return _text_keys(loader(text).get_single_data())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {' '.join(str(error.problem).split())}") from None
    except RecursionError:
        raise ConfigError(f"{place}: not valid YAML: nested without end") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


def _text_keys(value: Any) -> Any:
    """`value` with the keys of its mappings as text: YAML takes `1` for a number and `on` for true."""
    if isinstance(value, dict):
        mapping = cast(dict[Any, Any], value)
        return {key if isinstance(key, str) else show(key): _text_keys(item) for key, item in mapping.items()}
    if isinstance(value, list):
        return [_text_keys(item) for item in cast(list[Any], value)]
    return value


def read_yaml(path: Path, loader: Any = _UniqueKeyLoader) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: absent, unreadable, or not a mapping of names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{_shown(path)}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{_shown(path)}: is not UTF-8 text") from None
    return _mapping(parse_yaml(text, _shown(path), loader), _shown(path))


def load_run(name_or_path: str | Path, sets: Sequence[str] = (), site: str | None = None) -> RunConfig:
    """A sweep by name (`demo`) or path, with `--set` overrides such as `finetune.epochs=3`.

    Args:
        name_or_path: the sweep.
        sets: overrides, in order.
        site: name or path of a site, in place of the sweep's; `sets` go on top of it.

    Raises:
        ConfigError: one line; file (or `--set`), key, value, what is allowed, and a guess.
    """
    raw = _read("sweep", str(name_or_path))
    raw.values.pop(PROVENANCE, None)
    if site is not None:
        raw.assign(("site",), site, "--site")
    assignments = [parse_set(text) for text in sets]
    sections = ("data", "model", "site")
    whole = [key in {(name,) for name in sections} for key, _ in assignments]
    for (key, value), names_file in zip(assignments, whole, strict=True):
        if names_file:
            raw.assign(key, value, "--set")
    for name in sections:
        _resolve_section(raw, name)
    for (key, value), names_file in zip(assignments, whole, strict=True):
        if not names_file:
            raw.assign(key, value, "--set")
    _resolve_models_of_grid(raw)
    config = validate(raw, RunConfig)
    try:
        combinations(config)
    except GridError as error:
        raise ConfigError(f"{raw.locate(('grid', error.key))[0]}: {error}") from None
    return config


def load_data(name_or_path: str | Path, sets: Sequence[str] = ()) -> DataConfig:
    """A data set of configs/data, or of a path. Raises ConfigError."""
    return load_section("data", name_or_path, sets, DataConfig)


def load_model(name_or_path: str | Path, sets: Sequence[str] = ()) -> ModelConfig:
    """A model of configs/models, or of a path. Raises ConfigError."""
    return load_section("model", name_or_path, sets, ModelConfig)


def load_site(name_or_path: str | Path, sets: Sequence[str] = ()) -> SiteConfig:
    """A site of configs/sites, or of a path. Raises ConfigError."""
    return load_section("site", name_or_path, sets, SiteConfig)


def parse_set(text: str) -> tuple[Key, Any]:
    """`a.b=c` -> (("a", "b"), c) with c read as YAML; under `grid` the rest is one dotted key.

    Raises:
        ConfigError: not of that form.
    """
    name, equals, value = text.partition("=")
    first, *rest = name.strip().split(".")
    if not equals or not all((first, *rest)):
        raise ConfigError(f"--set {text}: write it as key=value, e.g. finetune.epochs=12")
    if not value.strip():
        raise ConfigError(f"--set {text}: gives no value; write {name.strip()}=null to take the key away")
    if first == "grid" and rest:
        rest = [".".join(rest)]
    return (first, *rest), parse_yaml(value, f"--set {name}")


def validate(raw: Raw, model: type[AnySection]) -> AnySection:
    """The config section of `raw`. Raises ConfigError for its first mistake."""
    try:
        return model.model_validate(raw.values)
    except ValidationError as error:
        raise ConfigError(explain(error, cast(type[BaseModel], model), raw.locate)) from None


def write_run_config(path: Path, config: RunConfig, provenance: Mapping[str, Any]) -> None:
    """Write a run's config.yaml: the resolved sweep, and what it is made with."""
    values: dict[str, Any] = {PROVENANCE: dict(provenance), **config.model_dump(mode="json")}
    write_text(path, _dump(values))


def read_run_config(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The resolved sweep of a run folder and its provenance. Raises ConfigError."""
    values = read_yaml(path)
    provenance = cast(dict[str, Any], values.pop(PROVENANCE, None) or {})
    return validate(Raw(values, {(): (_shown(path), 0)}), RunConfig), provenance


def write_cell(path: Path, cell: Cell) -> None:
    """Write `cells/<id>/config.yaml`."""
    write_text(path, _dump(cell.model_dump(mode="json")))


def read_cell(path: Path) -> Cell:
    """The cell of `cells/<id>/config.yaml`. Raises ConfigError."""
    return validate(Raw(read_yaml(path, OwnLoader), {(): (_shown(path), 0)}), Cell)


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.dump(values, Dumper=_OwnDumper, sort_keys=False, allow_unicode=True, width=110)


def load_section(kind: str, name_or_path: str | Path, sets: Sequence[str], model: type[AnySection]) -> AnySection:
    """A config of this kind by name or path, with overrides. Raises ConfigError."""
    raw = _read(kind, str(name_or_path))
    for key, value in map(parse_set, sets):
        raw.assign(key, value, "--set")
    return validate(raw, model)


def _read(kind: str, name_or_path: str, place: str = "", above: tuple[Path, ...] = ()) -> Raw:
    """A file with its bases below it."""
    path = find_config(kind, name_or_path, place)
    if path.resolve() in above:
        raise ConfigError(f"{_shown(path)}: base leads back to this file")
    values = read_yaml(path)
    shown = _shown(path)
    base = values.pop("base", None)
    own = Raw(values, {(): (shown, 0)})
    if base is None:
        return own
    raw = _read(kind, _text(base, f"{shown}: base"), f"{shown}: base: ", (*above, path.resolve()))
    raw.merge(own)
    raw.origins[()] = (shown, 0)
    return raw


def _resolve_section(raw: Raw, name: str) -> None:
    """Replace `data: NAME` or `data: {base: NAME, ...}` by the section itself."""
    value = raw.values.get(name)
    place, key = raw.locate((name,))
    spelled = f"{place}: {'.'.join(key)}"
    if isinstance(value, str):
        base, over = value, dict[str, Any]()
    elif isinstance(value, dict) and "base" in value:
        over = dict(cast(dict[str, Any], value))
        base = _text(over.pop("base"), f"{spelled}.base")
    elif value is None or isinstance(value, dict):
        return
    else:
        raise ConfigError(f"{spelled} = {show(value)} must be a name or a section.{guess('', known_names(name))}")
    section = _read(name, base, f"{spelled}: ").below((name,))
    section.merge(Raw({name: over}, raw.origins))
    raw.values[name] = section.values[name]
    raw.origins.update(section.origins)


def _resolve_models_of_grid(raw: Raw) -> None:
    """Replace names in `grid: {model: [NAME, ...]}` by the models themselves."""
    grid = raw.values.get("grid")
    names = cast(dict[str, Any], grid).get("model") if isinstance(grid, dict) else None
    if not isinstance(names, list):
        return
    place, key = raw.locate(("grid", "model"))
    spelled = f"{place}: {'.'.join(key)}"
    raw.values["grid"]["model"] = [
        _read("model", name, f"{spelled}: ").values if isinstance(name, str) else name
        for name in cast(list[Any], names)
    ]


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        raise ConfigError(f"{place}: is empty")
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: must be a mapping of keys to values, found {show(value)}")
    return cast(dict[str, Any], value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place} = {show(value)} must be the name of a config")
    return value


def _shown(path: Path) -> str:
    """The path as a user would type it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
