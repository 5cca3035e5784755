import sys
import types

import pytest

from steerscale.accelerators import find_accelerators


def test_missing_accelerators_are_said_to_be_missing() -> None:
    found = {accelerator.name: accelerator for accelerator in find_accelerators()}
    assert set(found) == {"Apex", "Transformer Engine", "Liger", "flash-attention"}
    for accelerator in found.values():
        assert accelerator.found or accelerator.note


def test_the_wrong_apex_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # PyPI's `apex` installs a package of that name without any of NVIDIA's modules.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    (apex,) = [accelerator for accelerator in find_accelerators() if accelerator.name == "Apex"]
    assert not apex.found
    assert "not NVIDIA's" in apex.note


def test_the_right_apex_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for module in ("", "optimizers", "normalization"):
        (tmp_path / "apex" / module).mkdir(exist_ok=True, parents=True)
        (tmp_path / "apex" / module / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    (apex,) = [accelerator for accelerator in find_accelerators() if accelerator.name == "Apex"]
    assert apex.found
    assert isinstance(sys.modules["apex.optimizers"], types.ModuleType)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
