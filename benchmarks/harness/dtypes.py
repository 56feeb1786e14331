"""The dtypes that benchmarks run in, by the names that commands and CSV rows use."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
