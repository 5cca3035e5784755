from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from steerscale.config import dump_yaml, from_mapping, load_yaml, require, to_mapping
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    rate: float = 0.1

    def __post_init__(self) -> None:
        require(self.width > 0, f"inner.width must be positive, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    name: str = "run"
    enabled: bool = True
    kind: Literal["adam", "sgd"] = "adam"
    limit: int | None = None
    maybe: Inner | None = None
    hooks: list[int] = field(default_factory=list)
    inners: list[Inner] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)


def outer(**values: Any) -> Outer:
    return from_mapping(Outer, {"inner": {"width": 1}, **values})


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        outer(**values)
    return str(caught.value)


def test_from_mapping_fills_defaults_and_nested_values() -> None:
    assert outer(inner={"width": 3, "rate": 2}) == Outer(inner=Inner(width=3, rate=2.0))


def test_unknown_key_is_refused_with_a_suggestion() -> None:
    assert refusal(enabld=True) == "unknown key 'enabld': did you mean 'enabled'?"
    assert refusal(inner={"width": 1, "raet": 1}) == "unknown key 'inner.raet': did you mean 'rate'?"
    assert "known keys: enabled, hooks, inner" in refusal(zzz=1)
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.zzz'"):
        from_mapping(Inner, {"zzz": 1}, at="optim")


def test_missing_key_is_named_in_full() -> None:
    assert refusal(inner={}).startswith("inner.width is missing")
    with pytest.raises(ConfigError, match=r"^inner is missing"):
        from_mapping(Outer, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": "many"}, "limit must be a whole number, got 'many'"),
        ({"limit": 1.5}, "limit must be a whole number, got 1.5"),
        ({"limit": True}, "limit must be a whole number, got True"),
        ({"inner": {"width": None}}, "inner.width must be a whole number, got None"),
        ({"inner": {"width": 1, "rate": "fast"}}, "inner.rate must be a number, got 'fast'"),
        ({"inner": {"width": 1, "rate": True}}, "inner.rate must be a number, got True"),
        ({"inner": {"width": 1, "rate": 10**400}}, f"inner.rate must be a finite number, got 1{'0' * 400}"),
        ({"inner": 3}, "inner must be a mapping, got 3"),
        ({"enabled": 1}, "enabled must be true or false, got 1"),
        ({"enabled": "yes"}, "enabled must be true or false, got 'yes'"),
        ({"name": 5}, "name must be text, got 5"),
        ({"name": None}, "name must be text, got None"),
        ({"kind": "adamm"}, "kind must be one of adam | sgd, got 'adamm'"),
        ({"kind": None}, "kind must be one of adam | sgd, got None"),
        ({"kind": ["adam"]}, "kind must be one of adam | sgd, got ['adam']"),
        ({"hooks": 3}, "hooks must be a list, got 3"),
        ({"hooks": "3"}, "hooks must be a list, got '3'"),
        ({"hooks": [1, "b"]}, "hooks[1] must be a whole number, got 'b'"),
        ({"inners": [{"width": 1}, {"width": 0}]}, "inner.width must be positive, got 0"),
        ({"inners": [{"widht": 1}]}, "unknown key 'inners[0].widht': did you mean 'width'?"),
        ({"weights": [1]}, "weights must be a mapping, got [1]"),
        ({"weights": {"de": "half"}}, "weights.de must be a number, got 'half'"),
    ],
)
def test_wrong_values_are_refused_by_key_and_value(values: dict[str, Any], message: str) -> None:
    assert refusal(**values) == message


@pytest.mark.parametrize("written", ["1e-4", "0.0001", "1.0e-4"])
def test_floats_are_accepted_as_people_write_them(written: str) -> None:
    # YAML 1.1 reads the first as text
    assert outer(inner={"width": 1, "rate": yaml.safe_load(written)}).inner.rate == 1e-4


def test_whole_floats_are_whole_numbers() -> None:
    limit = outer(limit=1.0e3).limit
    assert limit == 1000
    assert type(limit) is int


def test_none_is_for_optional_fields() -> None:
    assert outer(limit=None).limit is None
    assert outer(limit=0).limit == 0
    assert outer(maybe=None).maybe is None
    assert outer(maybe={"width": 2}).maybe == Inner(width=2)


def test_lists_and_mappings_are_converted_entry_by_entry() -> None:
    read = outer(hooks=(1, 2), inners=[{"width": 2}], weights={"de": "1e-1", 3: 1})
    assert read.hooks == [1, 2]
    assert read.inners == [Inner(width=2)]
    assert read.weights == {"de": 0.1, "3": 1.0}


def test_written_yaml_reads_back_the_same(tmp_path: Path) -> None:
    written = outer(inner={"width": 3, "rate": 1e-5}, maybe={"width": 4}, hooks=[1], weights={"süß": 0.5})
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(written), encoding="utf-8")
    assert from_mapping(Outer, load_yaml(path)) == written
    assert list(load_yaml(path))[:3] == ["inner", "name", "enabled"]
    assert "süß" in path.read_text(encoding="utf-8")


def test_to_mapping_is_plain_and_reads_back() -> None:
    model = ModelConfig(num_layers=2, d_model=8, num_heads=2, seq_len=16, rope_theta=5e5)
    assert from_mapping(ModelConfig, to_mapping(model)) == model
    assert all(value is None or isinstance(value, bool | int | float | str) for value in to_mapping(model).values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "must hold a YAML mapping, got list"),
        (b"", "must hold a YAML mapping, got NoneType"),
        (b"a: [1\n", "cannot be read as YAML"),
        (b"name: \xff\xfe\n", "cannot be read as YAML"),
    ],
    ids=["list", "empty", "broken", "not-utf-8"],
)
def test_load_yaml_refuses_what_is_no_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)


def test_load_yaml_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
