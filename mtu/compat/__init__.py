"""Compatibility with diffusers, accelerate, PEFT and quantizers, which change models that mtu reads.

Tasks and experts live elsewhere.
"""
