"""What is tried. The recipes themselves stand in the notebooks. In reading order:

``experiment``  a recipe as data: student, teacher, losses, training, steps after it
``study``       one corpus, keyword and split: its data, files and results
``one_run``     an experiment and a seed: is it done? Train, save, load, score, record
``all_runs``    every experiment and seed: cached, resumed, in parallel
``sweep``       a search for small models
``reproduce``   all notebooks from one command, progress, what failed
``verify``      own results against the published ones
"""
