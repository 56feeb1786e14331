"""How mtu meets the libraries around it: diffusers, accelerate, PEFT and quantizers change models that mtu reads.

Nothing here knows tasks or experts.
"""
