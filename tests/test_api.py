"""The ten lines: `import steerscale as ss`; and the notebook that uses them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steerscale as ss
from steerscale.config import dump_yaml
from steerscale.errors import ConfigError, LayoutError
from steerscale.interp.recipes import EditRecipe, Recipe, SAERecipe
from steerscale.interp.sources import SAESource
from steerscale.interp.splice import evaluate_splice
from steerscale.interp.steering import Edit
from steerscale.interp.text import sequences_of
from tests.interp.saes import perfect_sae, silent_sae

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(autouse=True)
def own_groups() -> Iterator[None]:
    """Other tests make process groups of their own."""
    yield
    ss.close()


def test_import_is_torch_free() -> None:
    code = "import sys, steerscale as ss; assert 'generate' in dir(ss); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod_model'"):
        ss.lod_model  # noqa: B018


def test_ten_lines(sae_run: Path, tmp_path: Path) -> None:
    lm = ss.load_model(sae_run.parent / "german_demo")
    sae = ss.load_sae(sae_run)
    x_SM = ss.capture(lm, "Das Paket", sae.hook)
    assert x_SM.shape == (len(lm.encode("Das Paket")), 32)
    found = ss.evaluate(lm, sae, samples=4)
    assert found.l0 == pytest.approx(4, abs=0.5)
    assert 0 < found.fvu < 1.5
    functions = ss.steer(lm, sae, {5: 20.0})
    assert ss.effect(lm, "Das Paket", functions).kl > 0.01
    plain, steered = (ss.generate(lm, "Das Paket", chosen, max_tokens=8) for chosen in (None, functions))
    assert plain
    assert plain == ss.generate(lm, "Das Paket", ss.steer(lm, sae, {5: 20.0}, strength=0.0), max_tokens=8)
    moved_SM = ss.capture(lm, "Das Paket", sae.hook, functions)
    delta_SM = (20.0 - sae.sae.encode(x_SM)[:, 5:6]) * sae.sae.W_dec[5] / sae.sae.input_scale
    torch.testing.assert_close((moved_SM - x_SM)[1:], delta_SM[1:], rtol=1e-4, atol=1e-3)
    assert torch.equal(moved_SM[0], x_SM[0])  # the end of the text before
    edits = [EditRecipe(latent=5, target=20.0)]
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(Recipe(saes=[SAERecipe(path=str(sae_run), edits=edits)])), encoding="utf-8")
    assert ss.generate(lm, "Das Paket", ss.recipe(lm, path), max_tokens=8) == steered
    same = ss.steer(lm, sae, [Edit(latent=5, value=1.0, mode="scale")])
    assert ss.effect(lm, "Das Paket", same).kl == 0
    with pytest.raises(LayoutError, match="call close"):
        ss.load_model(sae_run.parent / "german_demo", tensor=2)


def test_splice_of_everything_and_of_nothing(sae_run: Path) -> None:
    lm, own = ss.load_model(sae_run.parent / "german_demo"), ss.load_sae(sae_run)
    assert own.text is not None
    text = list(sequences_of(lm, own.text, samples=4))
    for make, fvu, recovered in ((perfect_sae, 0.0, 1.0), (silent_sae, None, 0.0)):
        source = SAESource(
            sae=make(32), hook=own.hook, lm=None, checkpoint=None, text=None, spare_special=False, spare_first=0
        )
        found = evaluate_splice(lm, source, text)
        assert found.recovered == pytest.approx(recovered, abs=1e-4)
        if fvu is not None:
            assert found.fvu == pytest.approx(fvu, abs=1e-6)
            assert found.l0 == pytest.approx(32, abs=0.5)
    with pytest.raises(ConfigError, match="does not bring a text"):
        ss.evaluate(lm, source)


def test_notebook_runs(sae_run: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "runs").symlink_to(sae_run.parent)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code" and "print(" in cell.source)
    for cell in notebook.cells:  # a letter that is in the little text of these runs
        cell.source = cell.source.replace('"Debian"', '"e"')
    repository = json.dumps(str(NOTEBOOK.parent.parent))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {repository})"))
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
