"""The icon models: a small text-to-image model trained from scratch, and the demo that upcycles it.

`python -m mtu.recipes.icons base` runs:

- `base_model`: the training of autoencoder, text encoder and UNet, which `vae`, `text_encoder` and `denoiser` build.
- `prompts`: the pictures and prompts that the base model learns from.
- `score`, `base_model_card`: the measurement of the base model, and its model card.

`python -m mtu.recipes.icons demo` runs:

- `demo`: upcycling the base model and training it on four tasks.
- `held_out_evaluation`: the comparison of its images with true targets before and after training.

Both use `device`, which checks devices and chooses the compute dtype.
"""
