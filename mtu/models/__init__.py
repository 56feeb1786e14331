"""Models: the upcycled UNet, its layers, and the operations on a model (adding tasks, saving parts, folding one task).

Nothing here knows pipelines, training or compiled code.
"""
