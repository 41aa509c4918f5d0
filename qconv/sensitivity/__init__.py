"""How much the model's output cares about an error of each linear: one pass forward, one back, layer by layer.

    head.py      labels drawn from the model's own distribution, and the gradient of their likelihood
    layer.py     a gradient taken back through one layer: its experts one by one, its router, its attention
    files.py     the activations and gradients between layers, on disk
    sweep.py     all layers, forward and back, resumable at every one

What comes of it is the diagonal of the Fisher information with respect to each linear's outputs. With the second
moments ``H`` of its inputs, an error ``d`` of its weight moves the output by a KL divergence of about ``1/2 sum_r F_r
d_r H d_r^T`` (Fisher as the Hessian of the divergence: Amari 1998, "Natural Gradient Works Efficiently in Learning").
"""
