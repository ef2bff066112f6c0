"""The paper's model in pure torch, on one device.

Shape legend, used in every signature: b batch, l text tokens, p image tokens (grid² + 1; + 2 with a distillation
token), q queries, m keys, d fusion width, e = 2d pooled width, v image tower width, t text tower width, w either
tower's width, c contrastive width, h heads (or image height where an image is meant).
"""
