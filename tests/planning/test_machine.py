from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from steerscale.errors import ConfigError
from steerscale.planning.cluster import load_cluster
from steerscale.planning.hardware import DEVICES
from steerscale.planning.machine import (
    ALIASES,
    LINK_GB_PER_SECOND,
    device_key,
    group_bandwidth,
    machine_mapping,
    machine_of,
    machine_of_cluster,
    read_calibration,
)


def test_every_device_has_a_link_and_every_alias_a_device() -> None:
    assert set(LINK_GB_PER_SECOND) == set(DEVICES)
    assert set(ALIASES.values()) <= set(DEVICES)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a100-40gb", "a100-sxm-40gb"),
        ("H100", "h100-sxm"),
        ("h200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
    ],
)
def test_device_key_takes_aliases_and_the_drivers_names(name: str, key: str) -> None:
    assert device_key(name) == key


def test_unknown_device_and_fp32_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU 'v100'.*a100-sxm-40gb.*--calibration"):
        machine_of("v100")
    with pytest.raises(ConfigError, match="no fp32 peak is known for h200"):
        machine_of("h200", precision="fp32")


def test_machine_of_a_cluster() -> None:
    alpha = machine_of_cluster(load_cluster("alpha"))
    assert (alpha.gpus_per_node, alpha.memory_gib, alpha.inter_node_gb_per_second) == (8, 40, 6.25)
    notes: list[str] = []
    generic = machine_of_cluster(load_cluster("generic"), device="h100", notes=notes)
    assert (generic.gpus_per_node, generic.intra_node_gb_per_second) == (4, 450)
    assert [note for note in notes if "25 GB/s for cluster.inter_node_gb_per_second" in note]
    with pytest.raises(ConfigError, match="cluster generic does not say which GPUs"):
        machine_of_cluster(load_cluster("generic"))


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(8, 1, 300), (16, 1, 200), (4, 2, 300), (8, 2, 100), (2, 8, 25), (64, 4, 50), (2, 16, 25)],
)
def test_group_bandwidth_adds_up_the_ports_of_a_group_in_a_node(size: int, stride: int, expected: float) -> None:
    machine = machine_of("a100-sxm-80gb")
    assert group_bandwidth(machine, size=size, stride=stride) == expected


def test_calibration_file_is_read_back(tmp_path: Path) -> None:
    machine = machine_of("h200")
    machine = replace(machine, efficiency=replace(machine.efficiency, matmul=0.61))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**machine_mapping(machine), "fitted": {"runs": ["a"]}}), encoding="utf-8")
    assert read_calibration(path) == machine
    path.write_text(yaml.safe_dump({**machine_mapping(machine), "peak": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key"):
        read_calibration(path)


def test_machine_refuses_impossible_values() -> None:
    machine = machine_of("h200")
    with pytest.raises(ConfigError, match=r"machine\.peak_tflops must be positive, got 0"):
        replace(machine, peak_tflops=0.0)
    with pytest.raises(ConfigError, match=r"efficiency\.matmul must be positive"):
        replace(machine.efficiency, matmul=0.0)
    with pytest.raises(ConfigError, match=r"efficiency\.layer_seconds must not be negative"):
        replace(machine.efficiency, layer_seconds=-1.0)
