import pytest

from steerscale.planning.fit import Fit, usable_gib
from steerscale.planning.memory import GIB, MemoryEstimate

TEN_GIB = MemoryEstimate(weights=GIB, gradients=2 * GIB, optimizer=3 * GIB, activations=3 * GIB, logits=0, buffers=GIB)


def test_a_tenth_of_40_gib_is_the_devices() -> None:
    assert usable_gib(40) == pytest.approx(36)
    assert usable_gib(80) == pytest.approx(73)


@pytest.mark.parametrize(("device_gib", "fits"), [(12.0, True), (11.8, False)])
def test_fit_is_decided_by_what_is_usable(device_gib: float, fits: bool) -> None:
    # 10 GiB and 1 of context leave room for the margin from 11 / 0.925 = 11.89 on
    fit = Fit(memory=TEN_GIB, device_gib=device_gib)
    assert fit.fits is fits
    assert fit.over_gib == pytest.approx(10 - (device_gib * 0.925 - 1))
    assert sum(fit.parts_gib().values()) == pytest.approx(11 + 0.075 * device_gib)
    assert (sum(fit.parts_gib().values()) <= device_gib) is fits


def test_parts_are_spoken_largest_first_without_nothing() -> None:
    text = Fit(memory=TEN_GIB, device_gib=40).spoken_parts()
    assert text.startswith(("optimizer 3.0, activations 3.0", "activations 3.0, optimizer 3.0"))
    assert "logits" not in text
    assert "context 1.0" in text
