"""From records to what people read; no torch. In reading order:

``records``     the JSON that each run leaves behind, and tables of them
``provenance``  the code, the environment and the machine of a run
``tracking``    logs of trainings, and their copy for Weights & Biases
``tables``      numbers and tables for people, what the five reports say beside them
``sentences``   what of it can be said in words
``plots``       figures
``page``        the HTML report, the README's tables, publishing
"""
