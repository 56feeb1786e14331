"""Models: the upcycled UNet, its layers, and operations on a model (adding tasks, saving, folding one task).

Pipelines, training and compiled code live elsewhere.
"""
