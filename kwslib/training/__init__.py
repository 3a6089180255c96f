"""How a net learns, shrinks and becomes a file. In reading order:

``quantize``     half precision, int8, whole-number weights of 8 or 4 bits
``compact``      the layout of a compact file, a whole detector in one
``checkpoints``  every file of weights: torch, compact, published by others
``material``     what a training hears: clips or pieces of stream, and val
``loop``         the one training loop
``tune``         steps that train again: plainly, on pieces of stream, for few bits
``prune``        whole units cut away
"""
