"""What is tried. The recipes themselves stand in the notebooks, see ``notebooks/recipes.md``. In reading order:

``study``      one corpus, keyword and split: its data, files and results
``run``        an experiment, a recipe as data, and a seed: is it done? Train, save, load, score, record
``workers``    every experiment and seed: cached, resumed, in parallel
``sweep``      a search for small models
``verify``     own results against the published ones, every model among people
``detector``   from a word to a detector, with a card
``reproduce``  all notebooks from one command, progress, what failed
"""
