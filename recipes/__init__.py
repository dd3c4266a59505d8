"""What to train. One TOML per run, with the data it needs or how it is made.

arithmetic          a model of a million parameters, made here, learns to ask Python for products
arithmetic-smollm2  SmolLM2-135M-Instruct learns the same from one worked example
"""
