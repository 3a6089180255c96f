"""Small-footprint keyword spotting: train, distil, quantize, stream, measure.

The rooms of this package form floors; a room imports only from floors below it:

0  ``paths config records tracking synthesis plots report published``   no torch
1  ``speech_commands corpora splits features augment models architectures losses metrics cost``
2  ``train quantize prune``
3  ``stream``
4  ``study experiments sweep``
5  ``cli``

Import from the room you need, for example ``from kwslib.study import open_study``.
"""

__version__ = "0.1.0"
