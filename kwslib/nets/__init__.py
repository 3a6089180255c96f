"""What is trained. In reading order:

``engine``   the training step in less time, with the same bytes everywhere
``crnn``     the detector of the reports, and how any net scores clips
``rivals``   other small nets of equal cost, teachers together, how a net is built from its sizes
``integer``  a small net and its log-mels in whole numbers
``losses``   labels, dark knowledge, attention, layers: the terms that a recipe adds up
``cost``     multiply-accumulates, parameters, milliseconds
"""
