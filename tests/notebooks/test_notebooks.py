"""Every notebook runs from start to end, and its two files hold the same cells."""

import pathlib

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def test_there_are_notebooks():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs_from_start_to_end(source, tmp_path):
    notebook = jupytext.read(source)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    assert any(cell.outputs for cell in code)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_paired_notebook_holds_the_same_cells(source):
    script, paired = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in script.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in paired.cells]
