"""README and guides: their code runs as it stands, their links lead somewhere, and each page is listed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
LINKING = [*PAGES, ROOT / "docs/README.md", ROOT / "CONTRIBUTING.md"]
# What a page needs beyond the package's own dependencies.
NEEDS = {"exporting": ["onnxscript", "onnxruntime"], "training": ["fontTools"]}
SLOW = ("compiling", "exporting", "inspecting", "memory", "pipelines", "tasks", "training")


def as_parameter(page):
    marks = [pytest.mark.slow] if page.stem in SLOW else []
    if page.stem == "exporting":
        # As in the tests of exporters: PyTorch's exporters use what PyTorch deprecates.
        kinds = ("DeprecationWarning", "FutureWarning", "UserWarning:torch.onnx")
        marks += [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in kinds]
    return pytest.param(page, marks=marks, id=page.stem)


@pytest.mark.parametrize("page", [as_parameter(page) for page in PAGES])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.stem, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(encoding="utf-8"), {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        # Tracebacks then name the line of the page.
        lines = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(lines, str(page), "exec"), names)


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_each_guide_is_listed(index):
    text = (ROOT / index).read_text(encoding="utf-8")
    assert all(f"guides/{page.name})" in text for page in PAGES[1:])
