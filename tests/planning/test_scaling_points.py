from pathlib import Path

import pytest

from steerscale.errors import DataError
from steerscale.planning.scaling_points import Point, check_points, read_points, without_highest


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "parameters,tokens,loss\n1e8,2e9,3.0\n",
        "# made by hand\nN,C,loss\n1e8,1.2e18,3.0\n",
        "loss,Training FLOP,D\n3.0,1.2e18,2e9\n",
        "Model Size,tokens,flops,loss\n1e8,2e9,9e99,3.0\n",
    ],
)
def test_read_points_takes_two_of_three_columns(tmp_path: Path, text: str) -> None:
    (point,) = read_points(written(tmp_path / "points.csv", text))
    assert (point.parameters, point.tokens, point.loss) == pytest.approx((1e8, 2e9, 3.0))
    assert point.flops == pytest.approx(1.2e18)
    assert point.name == "row 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,D,loss\n1e8,2e9,3\n1e8,2e9,nan\n", "row 2: loss must be a positive number, got 'nan'; leave out what"),
        ("N,D,loss\n1e8,,3\n", "row 1: D must be a positive number, got ''"),
        ("N,D,loss\n1e8,2e9\n", "row 1: loss must be a positive number, got None"),
        ("N,D,loss\n-1,2e9,3\n", "row 1: N must be a positive number, got '-1'"),
        ("N,loss\n1e8,3\n", "needs a column loss and two of parameters, tokens and flops; its header is N, loss"),
        ("", "its header is empty"),
        ("N,params,D,loss\n", "several columns for parameters: N, params; keep one"),
    ],
)
def test_read_points_names_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_points(written(tmp_path / "points.csv", text))
    assert message in str(caught.value)
    assert "points.csv" in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_bytes(b"N,D,loss\n\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as csv"):
        read_points(tmp_path / "points.csv")


def test_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    text = "name,N,D,loss,tokenizer\na,1e8,2e9,3,aaa\nb,1e8,4e9,2.9,bbb\nc,2e8,4e9,2.8,\n"
    points = read_points(written(tmp_path / "points.csv", text))
    with pytest.raises(DataError, match=r"different tokenizers cannot be compared: a \(aaa\), b \(bbb\)"):
        check_points(points, needed=1, purpose="a fit")
    check_points([points[0], points[2]], needed=2, purpose="a fit")
    with pytest.raises(DataError, match="a fit needs at least 3 points, got 2"):
        check_points(points[1:], needed=3, purpose="a fit")


def test_without_highest_drops_the_worst_and_keeps_the_order() -> None:
    points = [Point(parameters=1, tokens=1, loss=loss) for loss in (3.0, 5.0, 1.0, 4.0)]
    assert [point.loss for point in without_highest(points, 2)] == [3.0, 1.0]
    assert without_highest(points, 0) == points
    with pytest.raises(DataError, match="--drop-highest must be between 0 and 3 for 4 points, got 4"):
        without_highest(points, 4)
