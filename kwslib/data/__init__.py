"""Recordings in, arrays out. In reading order:

``speech_commands``  the public dataset: download, check, unpack, its own split
``synthesis``        words spoken by eSpeak NG in rooms and noise
``corpora``          either of them, or any folder, as one table of clips and one array of samples
``splits``           which clip is for training, validation, test
``features``         log-mels, computed once
``augment``          the same clip heard otherwise: views of the training part
``pieces``           pieces of stream to learn from, mixed of augmented clips
"""
