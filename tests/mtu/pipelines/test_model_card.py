"""The card of a saved pipeline is true, is kept up to date, and is left alone where someone else wrote it."""

import subprocess
import sys
import textwrap

import pytest
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub.errors import EntryNotFoundError

import mtu
from mtu.pipelines.model_card import write_model_card
from tests.mtu.pipelines.conftest import stock_pipeline
from tests.mtu.tiny import SD, upcycled_unet


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def written(tmp_path):
    """A folder with a card of a model of two tasks."""
    write_model_card(tmp_path, upcycled_unet(SD, tasks=["text-to-image", "edit"]))
    return tmp_path


@pytest.mark.slow
def test_each_block_of_the_card_runs_by_itself(tmp_path):
    """What loads a folder must say so with all that it needs, `import mtu` first."""
    mtu.upcycle(stock_pipeline()).save_pretrained(tmp_path)
    blocks = card(tmp_path).split("```python")[1:]
    assert len(blocks) == 2
    for block in blocks:
        lines = textwrap.dedent(block.partition("```")[0])
        code = f"folder = {str(tmp_path)!r}\n{lines}\nprint(type(pipe).__name__, len(pipe.unet.tasks))"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "MTUPipeline 4", done.stderr


def test_a_card_is_written_anew_when_the_model_is_another(written):
    assert "`edit`" in card(written)
    write_model_card(written, upcycled_unet(SD, tasks=["text-to-image", "remove"], num_experts=2))
    assert "`edit`" not in card(written)
    assert "`remove`" in card(written)
    assert "2 experts" in card(written)
    assert card(written).count("Written by mtu") == 1


@pytest.mark.parametrize("edit", [lambda text: text + "By us.\n", lambda text: text.replace("Multi", "Our multi")])
def test_an_edited_card_is_kept(written, edit):
    (written / "README.md").write_text(edit(card(written)), encoding="utf-8")
    edited = card(written)
    write_model_card(written, upcycled_unet(SD, tasks=["text-to-image"]))
    assert card(written) == edited


def test_a_card_of_another_hand_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# Ours\n")
    write_model_card(tmp_path, upcycled_unet(SD))
    assert card(tmp_path) == "# Ours\n"


def test_front_matter_and_ends_of_lines_are_no_edit(written):
    front = "---\nlibrary_name: diffusers\n---\n"
    (written / "README.md").write_text(front + card(written), encoding="utf-8", newline="\r\n")
    write_model_card(written, upcycled_unet(SD, tasks=["text-to-image"]))
    assert card(written).startswith(front)
    assert "`edit`" not in card(written)


def test_an_uploaded_folder_has_the_card(tmp_path, monkeypatch):
    """diffusers uploads a card of its own where there is none; that says nothing, and is replaced."""
    uploaded = []
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", not_found)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", lambda **given: uploaded.append(card(tmp_path)))
    populate_model_card(load_or_create_model_card("user/repo", is_pipeline=True)).save(tmp_path / "README.md")
    assert "automatically generated" in card(tmp_path)
    mtu.upcycle(stock_pipeline())._upload_folder(tmp_path, "user/repo")
    assert "library_name: diffusers" in uploaded[0]
    assert "mtu.MTUPipeline.from_pretrained(folder)" in uploaded[0]


def not_found(*args, **kwargs):
    raise EntryNotFoundError("none")
