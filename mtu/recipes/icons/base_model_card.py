"""The model card of the icon base model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtu.storage import write_text

CARD_TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Icons base: a text-to-image model that trains on a laptop

A complete Stable Diffusion pipeline of {total:.1f} M parameters (UNet {unet:.2f} M, autoencoder {vae:.2f} M, text
encoder {text:.2f} M) that draws 64×64 icons: {names} names, plain or outlined, in 8 colours on 4 backgrounds. It is
the pre-trained model that `mtu` upcycles into a multi-task model in tests and in the demonstration; as a model of
pictures it is a toy.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("mtu/assets/icons-base")
image = pipeline("a red outlined bell on white", num_inference_steps={steps}, guidance_scale={scale}).images[0]
```

![Generated pictures, each above the true picture of the same caption](samples.png)

Each generated picture is above the true picture of its caption; no combination shown was in the training set.

## How it was made

    {command}

Seed {seed}; {vae_minutes:.0f} minutes for the autoencoder ({vae_steps} steps of {vae_batch} pictures) and
{denoiser_minutes:.0f} minutes for UNet and text encoder ({denoiser_steps} steps of {denoiser_batch}) on {machine}.
{remark}

- Data: icons of the Material Design Icons font, rendered in 8 colours on 4 backgrounds. The 10 % of base names in the
  test split and the 5 % in the validation split are in no training picture; neither are the held-out tenth
  (test) and 3 % (validation) of the combinations of icon, colour and background.
- Autoencoder: 64×64×3 to 16×16×4, trained on all training icons, mirrored ones and half-size ones too, and on
  degraded pictures as in super-resolution.
- UNet and text encoder: noise prediction, weighted by min-SNR (γ = 5) and more where the noise is strong, Stable
  Diffusion's noise schedule, a tenth of the prompts empty, averaged weights. {scenes:.0%} of the pictures are scenes
  of two half-size icons ("a red bell and a blue star on white"). {instructions:.0%} of the other prompts say part of
  the picture through instructions ("a blue bell on white, make it red, outline it"), and {removed:.0%} of the scenes
  remove an icon ("…, remove the blue star"), so that the frozen text encoder of a later multi-task model knows these
  words. Crossed-out icons are drawn too.

## How good it is

Measured by `mtu.recipes.icons.score` on the float16 weights of this folder, run in float32. Text-to-image: {samples}
generated pictures for captions of held-out combinations, {steps} steps, guidance scale {scale} (chosen on the
validation combinations).

| measure | value |
|---|---|
| right icon nearest (squared pixel error) among {candidates} candidates | {retrieval_top1:.1%} |
| right icon nearest among all {all_icons} icons | {retrieval_top1_of_all:.1%} |
| right colour | {colour_accuracy:.1%} |
| right background | {background_accuracy:.1%} |
| median PSNR against the true picture | {psnr_median:.1f} dB |
| autoencoder: median PSNR on icons never seen, all kinds | {vae_psnr:.1f} dB |

Candidates are painted in the requested colour and background, so only the shape decides, and the same name in the
other style is always among them.

Autoencoder by kind of picture: {vae_kinds}.

## Limits

It knows only the names that it was trained on, and it draws nothing but such icons. Other words are encoded (every
byte is a token), but mean nothing to it.

## Licences

Apache-2.0, as the library. The training pictures come from the Material Design Icons font, under the Pictogrammers
Free License (icons and font: Apache-2.0).
"""


def write_base_model_card_and_provenance(
    folder: Path, metrics: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Write the model card `README.md`, and add the provenance to `metrics.json`.

    Args:
        folder: the folder of the model.
        metrics: the metrics that `score_base_pipeline_in_folder` returned.
        provenance: how the model was made, which fills the remaining fields of `CARD_TEMPLATE`.
    """
    parameters = {name: count / 1e6 for name, count in metrics["parameters"].items()}
    kinds = {kind: value for kind, value in metrics["vae_psnr"].items() if kind != "all"}
    fields = {
        **provenance,
        **metrics["text_to_image"],
        "total": sum(parameters.values()),
        "unet": parameters["unet"],
        "vae": parameters["vae"],
        "text": parameters["text_encoder"],
        "samples": metrics["samples"],
        "scale": metrics["guidance_scale"],
        "steps": metrics["steps"],
        "candidates": metrics["candidates"],
        "vae_psnr": metrics["vae_psnr"]["all"],
        "vae_kinds": ", ".join(f"{kind} {value:.1f} dB" for kind, value in kinds.items()),
    }
    write_text(folder / "README.md", CARD_TEMPLATE.format(**fields))
    write_text(folder / "metrics.json", json.dumps({**metrics, "training": dict(provenance)}, indent=2) + "\n")
