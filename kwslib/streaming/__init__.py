"""The same weights on endless sound. In reading order:

``model``     a net with its state, exact for any chunking
``tracks``    long recordings with known keywords, from a specification
``events``    what a user would notice; keywords found and false alarms, counted; PocketSphinx too
``decision``  threshold, smoothing, probability: chosen on streams of val
``listen``    sound as it arrives: a file, a pipe, the microphone
``export``    whole detectors as ONNX and TorchScript, and how fast they are
``player``    the same in a page: a detector that listens in a browser
"""
