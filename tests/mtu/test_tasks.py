"""Task specs: what they accept, and the paper's settings."""

import dataclasses
import json

import pytest

from mtu import TaskSpec, tasks
from mtu.tasks import SD_TASKS, SDXL_TASKS, as_task_specs

# name, condition channels, guidance, text scale, image scale, steps: the table of DESIGN §5.
SD_FACTS = [
    ("text-to-image", 0, "text", 7.5, None, 20),
    ("edit", 4, "dual", 7.5, 1.6, 20),
    ("super-resolution", 4, "none", 1.0, None, 20),
    ("remove", 4, "dual", 4.0, 1.5, 20),
]
SDXL_FACTS = [
    ("text-to-image", 0, "text", 5.0, None, 50),
    ("edit", 4, "dual", 10.0, 1.5, 50),
    ("super-resolution", 4, "none", 1.0, None, 50),
    ("remove", 4, "dual", 4.0, 1.5, 50),
]


@pytest.mark.parametrize(("specs", "facts"), [(SD_TASKS, SD_FACTS), (SDXL_TASKS, SDXL_FACTS)], ids=["sd", "sdxl"])
def test_built_in_tasks_have_the_papers_settings(specs, facts):
    fields = ("name", "condition_channels", "guidance", "guidance_scale", "image_guidance_scale", "num_inference_steps")
    assert [tuple(getattr(spec, field) for field in fields) for spec in specs] == facts
    super_resolution = specs[2]
    assert (super_resolution.scale, super_resolution.resample, super_resolution.uses_prompt) == (2, "bicubic", False)
    assert all(spec.uses_prompt and spec.scale == 1 for spec in specs if spec is not super_resolution)
    assert [spec.takes_image for spec in specs] == [False, True, True, True]


def test_built_in_tasks_are_exported():
    assert (tasks.TEXT_TO_IMAGE, tasks.EDIT, tasks.SUPER_RESOLUTION, tasks.REMOVE) == SD_TASKS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("name", name)
            for name in ("", "Edit", "two words", "../up", ".hidden", "a/b", "é", "a\n", "a" * 101, 3, None)
        ],
        *[("condition_channels", count) for count in (-1, 1.0, "4", True, None)],
        *[("num_inference_steps", count) for count in (0, -5, 2.5, True)],
        *[("scale", count) for count in (0, 0.5, False)],
        *[("guidance", kind) for kind in ("cfg", None, "Text")],
        *[("resample", kind) for kind in ("nearest", None)],
        *[("guidance_scale", scale) for scale in ("7.5", None, float("nan"), float("inf"), True)],
        *[("image_guidance_scale", scale) for scale in ("1.5", float("nan"), True)],
        *[("uses_prompt", flag) for flag in (1, None, "yes")],
    ],
)
def test_a_field_out_of_its_range_raises(field, value):
    good = {"name": "depth", "guidance": "dual", "image_guidance_scale": 1.5}
    with pytest.raises(ValueError, match=f"{'task name' if field == 'name' else field} .*but got"):
        TaskSpec(**{**good, field: value})


@pytest.mark.parametrize("fields", [{"condition_channels": 0, "image_guidance_scale": 1.5}, {}])
def test_dual_guidance_needs_an_image_and_its_scale(fields):
    with pytest.raises(ValueError, match="dual guidance needs"):
        TaskSpec("edit", guidance="dual", **fields)


def test_specs_are_frozen_and_hashable():
    spec = TaskSpec("depth")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"
    assert spec in {TaskSpec("depth")}


@pytest.mark.parametrize("spec", [*SD_TASKS, TaskSpec("depth.v2_b-1", condition_channels=9, resample="bilinear")])
def test_a_spec_survives_json(spec):
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("fields", [{}, {"condition_channels": 4}, {"name": "a", "colour": 1}, None, ["name"], "name"])
def test_a_description_that_is_not_one_raises(fields):
    with pytest.raises(ValueError, match="A task is described by the fields"):
        TaskSpec.from_dict(fields)


def test_task_lists_take_specs_dictionaries_and_names():
    own = TaskSpec("depth")
    assert as_task_specs(iter(["edit", own, tasks.REMOVE.to_dict()])) == (tasks.EDIT, own, tasks.REMOVE)
    assert as_task_specs(["edit"], SDXL_TASKS) == (SDXL_TASKS[1],)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "at least one task"),
        (["edit", "edit"], ValueError, "must be unique"),
        ([TaskSpec("edit"), "edit"], ValueError, "must be unique"),
        (["inpaint"], ValueError, "Unknown task 'inpaint'"),
        ("edit", TypeError, "list of tasks"),
        (tasks.EDIT, TypeError, "list of tasks"),
        (tasks.EDIT.to_dict(), TypeError, "list of tasks"),
        ([3], TypeError, "but got int"),
        ([None], TypeError, "but got NoneType"),
    ],
)
def test_a_bad_task_list_raises(given, error, message):
    with pytest.raises(error, match=message):
        as_task_specs(given)
