import pytest

from steerscale.config import from_mapping
from steerscale.data.config import DataConfig
from steerscale.errors import ConfigError


def test_weights_are_normalised():
    assert DataConfig(blend={"a": 3, "b": 1}).weights == {"a": 0.75, "b": 0.25}
    assert DataConfig(path="a").weights == {"a": 1.0}
    assert from_mapping(DataConfig, {"blend": {"a": 1}, "skip": [[0, 2]]}).skip == [[0, 2]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of data.path and data.blend must be given, got neither"),
        ({"path": "a", "blend": {"b": 1.0}}, "got path and blend"),
        ({"blend": {}}, "data.blend is empty"),
        ({"blend": {"a": 1.0, "b": 0.0}}, r"data.blend\['b'\] must be positive, got 0.0"),
        ({"blend": {"a": 1.0, "b": float("nan")}}, "must be positive, got nan"),
        ({"blend": {"a": 1.0, "b": 0.0001}}, r"data.blend\['b'\] is 0.0001 of all weights"),
        ({"path": "a", "skip": [[3, 3]]}, r"data.skip\[0\] must be \[start, end\)"),
        ({"path": "a", "skip": [[0, 1], [1, 2, 3]]}, r"data.skip\[1\]"),
        ({"path": "a", "skip": [[3, 10**20]]}, r"data.skip\[0\] must be .* end <= 2\^62"),
        ({"path": "a", "num_prefetch": -1}, "data.num_prefetch must be at least 0"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**values)
