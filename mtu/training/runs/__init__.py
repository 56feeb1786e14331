"""Complete trainings from a configuration, and what is known about them before they start.

- `run_config`: the settings, each declared once for YAML, flags and documentation.
- `settings_file`: reads them from a YAML file and flags.
- `typed_values`: checks each value against the type of its setting.
- `run`: the training itself, `run_training`.
- `run_checks`: what is checked of it before a model is loaded.
- `base_model`, `task_data`: the model and the data that it starts from.
- `validation`, `validation_pictures`, `training_plots`: pictures and plots in its course.
- `dry_run`, `dry_run_report`: what it will take, computed without weights.
- `peak_memory`: the memory that a step of a training takes, computed without weights.
- `settings`: the settings that the package ships, as YAML files.

`mtu.training` exports `run_training` and `read_run_config`.
"""
