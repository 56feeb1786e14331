"""The smallest demo that goes through all of its steps."""

from mtu.recipes.icons.demo import DemoConfig

SMALL_DEMO = DemoConfig(
    max_training_minutes=5,
    max_training_steps=3,
    training_examples_per_task=4,
    held_out_examples_per_row=1,
    batch_per_task=1,
    inference_steps=2,
)
