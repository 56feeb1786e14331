"""Which devices have autocast."""

import torch


def has_autocast(device_type: str) -> bool:
    """Whether ``torch.autocast`` knows a type of device ("cpu", "cuda", …): the meta device, for one, has none.

    Compilers may ask, too.
    """
    # torch 2.11 cannot trace the question. Of the devices that programs are compiled for, meta alone has none.
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
